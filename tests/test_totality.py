"""Total maps: no tensor of any release can vanish, appear or change its shape unnoticed."""

import json
import re
from collections import Counter
from functools import cache

import pytest
from header_fixtures import fixtures

from arch_maps.facts import Facts
from arch_maps.ops import Source as Leaf
from arch_maps.ops import sources
from arch_maps.registry import find
from arch_maps.rules import Kind, targets
from converter.errors import PlanError
from converter.plan.match import disagreements, match_release, unmatched

FIXTURES = fixtures()
UNSTATED = (
    *("subsample_conv_projection.", "indexer.k_norm.", "model.qwen2_model."),
    "vision_tower.timm_model.",
)
"""Modules whose sizes no config states: they are constants of the releases' code."""
_NUMBER = re.compile(r"\.\d+\.")
each_fixture = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.id)


@cache
def matched(index):
    return match_release(FIXTURES[index].source(), find(FIXTURES[index].model_type))


def match_of(fixture):
    return matched(FIXTURES.index(fixture))


@cache
def expanded(index):
    """Every layout of the fixture's map, expanded from the config: no tensor is looked at."""
    fixture = FIXTURES[index]
    arch = find(fixture.model_type)
    return {layout.name: arch.expand(Facts(fixture.config), layout) for layout in arch.layouts}


def wanted_by(fixture):
    """The rules and drops of the layout that the release has."""
    return expanded(FIXTURES.index(fixture))[match_of(fixture).layout.name]


def mapped(fixture):
    return {leaf.name for rule in match_of(fixture).rules for leaf in sources(rule.expr)}


def problems_of(fixture, tensors=None, **config):
    with pytest.raises(PlanError) as raised:
        match_release(fixture.source(tensors, **config), find(fixture.model_type))
    return raised.value.problems


def one_of(fixture):
    """A tensor name that stands for the rest: any one is tried against the whole command below."""
    names = list({_NUMBER.sub(".N.", name): name for name in fixture.tensors}.values())
    return names[len(fixture.id) % len(names)]


def parts_of(names):
    """Disjoint shares of the names: what is found of one tensor does not depend on the others."""
    names = sorted(names)
    count = 8 if len(names) < 5000 else 2
    return [names[start::count] for start in range(count)]


@each_fixture
def test_every_tensor_is_used_or_dropped_with_a_reason(fixture):
    match = match_of(fixture)
    used = Counter(leaf.name for rule in match.rules for leaf in sources(rule.expr))
    dropped = [drop.name for drop in match.drops]
    # A tensor is read twice only where it is split, or where a tied table is stored as a head.
    for rule in match.rules:
        whole = isinstance(rule.expr, Leaf) and rule.kind not in (Kind.HEAD, Kind.EMBEDDING)
        assert not (whole and used[rule.expr.name] > 1)
    assert not used.keys() & set(dropped)
    assert used.keys() | set(dropped) == set(fixture.tensors)
    assert all(drop.reason for drop in match.drops)
    assert len(targets(match.rules)) == len(match.rules)


@each_fixture
def test_the_layout_stays_when_any_one_tensor_goes_or_comes(fixture):
    """So that what follows, of one layout, holds for the release. Where two layouts differ in a
    name or two, a release without such a tensor misses it in one spelling or the other."""
    source, own = fixture.source(), match_of(fixture).layout.name
    others = expanded(FIXTURES.index(fixture))
    assert unmatched(source, others[own]) == 0
    names = {n: {s.name for r in t.rules for s in sources(r.expr)} for n, t in others.items()}
    for name, tensors in others.items():
        if 0 < unmatched(source, tensors) < 3:
            for gone in names[own] - names[name]:
                rest = {n: t for n, t in fixture.tensors.items() if n != gone}
                (problem,) = problems_of(fixture, rest)
                assert problem.split()[1] in {gone} | (names[name] - names[own])


@each_fixture
def test_each_deleted_tensor_is_named(fixture):
    have, tensors, needed = fixture.source().tensors, wanted_by(fixture), mapped(fixture)
    required = {drop.name for drop in tensors.drops if drop.required}
    witnesses = {drop.only_with for drop in tensors.drops} - {None}
    for share in parts_of(needed | required):
        gone = set(share) - witnesses
        rest = {name: info for name, info in have.items() if name not in gone}
        assert {problem.partition(" (")[0] for problem in disagreements(rest, tensors)} == {
            f"missing: {name}" for name in gone
        }
    for name in witnesses & needed:
        rest = {n: info for n, info in have.items() if n != name}
        assert any(p.startswith(f"missing: {name}") for p in disagreements(rest, tensors))


@each_fixture
def test_each_added_tensor_is_named(fixture):
    have, tensors = fixture.source().tensors, wanted_by(fixture)
    for share in parts_of(have):
        added = {f"{name}.extra": have[name] for name in share}
        found = disagreements({**have, **added}, tensors)
        assert {problem.split()[1] for problem in found} == set(added)
        assert all(problem.startswith("surplus: ") for problem in found)


@each_fixture
def test_each_wrong_shape_is_named(fixture):
    """A needed tensor always; a dropped one where the drop states a shape."""
    have, tensors, needed = fixture.source().tensors, wanted_by(fixture), mapped(fixture)
    stated = {d.name for d in match_of(fixture).drops if d.shape is not None}
    wrong = {name: have[name]._replace(shape=(*have[name].shape, 3)) for name in needed | stated}
    found = disagreements({**have, **wrong}, tensors)
    assert {problem.split()[2] for problem in found} == set(wrong)
    assert all(problem.startswith("wrong shape: ") for problem in found)


@each_fixture
def test_one_fault_of_each_kind_is_one_line_of_the_plan_error(fixture):
    name = one_of(fixture)
    if name in mapped(fixture):
        (problem,) = problems_of(fixture, {n: t for n, t in fixture.tensors.items() if n != name})
        assert problem.startswith(f"missing: {name}")
    extra = f"{name.rpartition('.')[0]}.adapter"
    (problem,) = problems_of(fixture, {**fixture.tensors, extra: ("F32", (2, 5))})
    assert problem.startswith(f"surplus: {extra} [2, 5] in model.safetensors")


def layer_count(config):
    """The section and key that state the number of text layers, if the config states it."""
    for section in (config.get("text_config"), config.get("language_config"), config):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(section, dict) and isinstance(section.get(key), int):
                return section, key
    return None


@pytest.mark.parametrize(
    "fixture",
    # nemotron_h lists its layers in a pattern, which this count does not change.
    [f for f in FIXTURES if layer_count(f.config) and f.model_type != "nemotron_h"],
    ids=lambda f: f.id,
)
def test_a_layer_too_many_is_told(fixture):
    """A config of one layer less: the last layer is surplus, or the config is at odds.

    Where a layer's kind depends on how many follow it, earlier ones may differ as well.
    """
    config = json.loads(json.dumps(fixture.config))
    section, key = layer_count(config)
    section[key] -= 1
    for listed in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(section.get(listed), list):
            section[listed] = section[listed][:-1]
    last = section[key]
    problems = problems_of(fixture, **config)
    surplus = [p for p in problems if p.startswith("surplus: ") and "more like these" not in p]
    assert surplus or all("config.json" in problem for problem in problems), problems
    named = [p for p in surplus if f".{last}." in p or f"{{{last}}}" in p]
    assert named or not surplus, surplus


@each_fixture
def test_a_wrong_shape_is_told_in_the_words_of_the_config(fixture):
    """One tensor of each pattern of names: sizes are named by the config's own keys."""
    by_name = {leaf.name: leaf for r in match_of(fixture).rules for leaf in sources(r.expr)}
    have, tensors = fixture.source().tensors, wanted_by(fixture)
    patterns = {_NUMBER.sub(".N.", name): name for name in by_name}
    wrong = {name: have[name]._replace(shape=(*have[name].shape, 3)) for name in patterns.values()}
    for problem in disagreements({**have, **wrong}, tensors):
        name = problem.split()[2]
        shape = have[name].shape
        assert problem.startswith(f"wrong shape: {name} is {[*shape, 3]} in model.safetensors")
        expected = problem.partition("config.json makes it ")[2]
        sizes = [n for n in expected[1:-1].split(", ") if n]
        assert [int(n.rpartition("=")[2]) for n in sizes] == list(shape)
        if not any(part in name for part in UNSTATED) and name.endswith(
            ("_proj.weight", "norm.weight", "dense.weight", "embed_tokens.weight")
        ):
            assert re.search(r"[a-z_]{3,}", expected), problem


def test_the_words_of_one_wrong_shape():
    fixture = next(f for f in FIXTURES if f.id == "llama/Llama-3.2-3B")
    name = "model.layers.7.self_attn.k_proj.weight"
    (problem,) = problems_of(fixture, {**fixture.tensors, name: ("BF16", (3072, 3072))})
    assert problem == (
        f"wrong shape: {name} is [3072, 3072] in model.safetensors, but config.json makes it "
        "[num_key_value_heads*head_dim=1024, hidden_size=3072]"
    )


def test_a_misspelled_tensor_gets_a_hint_on_both_sides():
    fixture = next(f for f in FIXTURES if f.id == "qwen3/Qwen3-0.6B")
    tensors = dict(fixture.tensors)
    tensors["model.layers.3.self_attn.q_norms.weight"] = tensors.pop(
        "model.layers.3.self_attn.q_norm.weight"
    )
    missing, surplus = problems_of(fixture, tensors)
    assert missing.endswith("(did you mean model.layers.3.self_attn.q_norms.weight?)")
    assert surplus.endswith("(did you mean model.layers.3.self_attn.q_norm.weight?)")
