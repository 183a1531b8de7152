"""Maps against real headers: every tensor accounted for, and every fault named."""

import json
import re
from pathlib import Path

import header_fixtures
import pytest
from header_fixtures import collapse, expand, fixtures, source_of

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find, map_name, model_types
from arch_maps.rules import Drop, Kind, Layout, Mount, Tensors
from converter.plan import Options, build_plan
from converter.plan.match import find_map, match_release
from converter.source import open_folder
from quant.recipe import QuantSpec
from validate.loaded import compare_loaded, computed_on_load, taken_apart
from validate.runtime import MlxRuntime, runtimes_for
from validate.twin import load_example
from validate.twin.families import family_of
from validate.twin.shrink import shrink_config

FIXTURES = fixtures()
_NUMBER = re.compile(r"\.\d+\.")
each_fixture = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.id)
THOROUGH = {"bert", "llama", "minicpmv4_6", "qwen3", "qwen3_5"}
each_type = pytest.mark.parametrize("model_type", model_types())


# The fixtures themselves


@each_fixture
def test_fixture_has_the_totals_that_the_release_states(fixture):
    stated = fixture.data.get("published", {})
    totals = fixture.totals()
    assert {key: totals[key] for key in stated.keys() & header_fixtures.TOTALS} == {
        key: stated[key] for key in stated.keys() & header_fixtures.TOTALS
    }
    for prefix, count in stated.get("prefixes", {}).items():
        assert sum(name.startswith(prefix) for name in fixture.tensors) == count, prefix
    if "dtypes" in stated:
        assert {code for code, _ in fixture.tensors.values()} == set(stated["dtypes"])


@each_fixture
def test_fixture_says_where_it_comes_from(fixture):
    assert fixture.data["origin"] in ("published", "transformers 5.23.0 meta device", "map")
    assert fixture.data["evidence"].endswith(".")
    assert map_name(fixture.config) == fixture.model_type


def test_fixture_notation_round_trips():
    tensors = {f"a.{i}.w": ("BF16", (2, 3)) for i in (0, 1, 2, 5, 7)} | {"b": ("F32", ())}
    tensors["a.3.w"] = ("F32", (2, 3))
    assert collapse(tensors) == {
        "a.{0-2,5,7}.w": ["BF16", [2, 3]],
        "a.{3}.w": ["F32", [2, 3]],
        "b": ["F32", []],
    }
    assert expand(collapse(tensors)) == tensors
    with pytest.raises(AssertionError, match=r"a\.1\.w is listed twice"):
        expand({"a.{0-2}.w": ["F32", [1]], "a.1.w": ["F32", [1]]})


# Layouts


@pytest.mark.parametrize(
    ("fixture_id", "layout"),
    [
        ("bert/all-MiniLM-L6-v2", "encoder"),
        ("bert/bert-base-uncased", "from TensorFlow"),
        ("qwen3_5_text/Qwen3.5-27B-text", "transformers"),
        ("qwen3_5_text/Jev-Style-2B-Decision-v3", "cut from the multimodal release"),
    ],
)
def test_layout_is_found_by_names(fixture_id, layout):
    fixture = next(f for f in FIXTURES if f.id == fixture_id)
    assert match_release(fixture.source(), find(fixture.model_type)).layout.name == layout


@each_type
def test_layouts_fill_the_same_targets(model_type):
    arch = find(model_type)
    config = load_example(model_type)
    filled = [
        {(r.target, r.expr.shape, r.kind) for r in arch.expand(Facts(config), layout).rules}
        for layout in arch.layouts
    ]
    assert all(one == filled[0] for one in filled)


def test_layout_leaves_rename_whole_words_of_source_names_only():
    layout = Layout("old", {}, {"Norm.weight": "Norm.gamma"})
    out = Tensors()
    root = Mount(out, leaves=layout.leaves)
    child = root / "block"
    child.norm("Norm", 8, bias=True)
    child.norm("LayerNorm", 8)
    child.drop("Norm.weight", "not used")
    assert [sources(rule.expr)[0].name for rule in out.rules] == [
        "block.Norm.gamma",
        "block.Norm.bias",
        "block.LayerNorm.weight",
    ]
    assert [rule.target for rule in out.rules] == [
        "block.Norm.weight",
        "block.Norm.bias",
        "block.LayerNorm.weight",
    ]
    assert out.drops == [Drop("block.Norm.gamma", "not used")]


def test_trained_folder_matches(tinylm):
    source = open_folder(tinylm)
    match = match_release(source, find_map(source.config))
    assert {leaf.name for r in match.rules for leaf in sources(r.expr)} == set(source.tensors)


def test_a_stored_tied_head_must_equal_the_table():
    fixture = next(f for f in FIXTURES if f.id == "qwen3/Qwen3-0.6B")
    match = match_release(fixture.source(), find("qwen3"))
    (drop,) = match.drops
    assert (drop.name, drop.same_as) == ("lm_head.weight", "model.embed_tokens.weight")


# The runtimes' own parameter trees


def twin_source(model_type):
    """The twin's config and the tensors that its map needs, without any weights."""
    config, _ = shrink_config(load_example(model_type), family_of(model_type))
    arch = find(model_type)
    expanded = arch.expand(Facts(config), arch.layouts[0])
    needed = [drop for drop in expanded.drops if drop.required]
    tensors = {drop.name: ("BF16", tuple(map(int, drop.shape))) for drop in needed}
    for rule in expanded.rules:
        # As releases store them: the state of a recurrence may be float32.
        whole = dict.fromkeys((Kind.INDEX, Kind.HASH), "I64")
        code = {Kind.STATE: "F32", **whole}.get(rule.kind, "BF16")
        tensors |= {leaf.name: (code, tuple(map(int, leaf.shape))) for leaf in sources(rule.expr)}
    return source_of({**config, "dtype": "bfloat16"}, tensors)


RECIPES = {
    "plain": Options(),
    "4bit": Options(quant=QuantSpec.make("affine", 4, 64)),
    "mxfp4": Options(quant=QuantSpec.make("mxfp4")),
    "mixed": Options(quant=QuantSpec.make("affine", 4, 64), predicate="mixed_4_6"),
}


@pytest.mark.usefixtures("runtimes")
@pytest.mark.parametrize(
    ("model_type", "recipe"),
    # The stock mixed recipes name modules that an encoder does not have.
    [
        (t, r)
        for t in model_types()
        for r in (RECIPES if t in THOROUGH else ("plain", "4bit"))
        if (t, r) != ("bert", "mixed")
        if r == "plain" or "text" in find(t).modalities  # towers stay as they are
    ],
)
def test_targets_are_the_parameters_of_the_stock_runtimes(model_type, recipe, tmp_path):
    """Files of zeros with the plan's headers and config, loaded by the stock loaders."""
    source = twin_source(model_type)
    plan = build_plan(source, match_release(source, find(model_type)), RECIPES[recipe])
    write_zeros(plan, tmp_path)
    written = {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors}
    assert runtimes_for(plan.config) == tuple(
        name.replace("-", "_") for name in find(model_type).runtimes
    )
    for runtime in runtimes_for(plan.config):
        parameters = MlxRuntime.load(tmp_path, runtime=runtime).parameters()
        parameters = dict(taken_apart(tmp_path, parameters.items()))
        loaded = {
            n: (_CODES[str(a.dtype)], tuple(a.shape))
            for n, a in parameters.items()
            if not n.endswith(computed_on_load(tmp_path))
        }
        expected = written
        if runtime == "mlx_lm":  # it runs the text part only
            parts = {out.rule.target: out.rule.part for out in plan.outputs}
            towers = {_tower(name) for name, part in parts.items() if part != "text"}
            expected = {n: v for n, v in written.items() if _tower(n) not in towers}
        assert _stripped(loaded) == _stripped(expected)
        # Zeros stay zeros: the loader's own renaming and rescaling finds nothing to do.
        compared = compare_loaded(tmp_path, parameters, text_only=runtime == "mlx_lm")
        assert compared.problems == ()


_CODES = {"mlx.core.bfloat16": "BF16", "mlx.core.float32": "F32"}
_CODES |= {"mlx.core.uint32": "U32", "mlx.core.uint8": "U8", "mlx.core.int32": "I32"}
_CODES["mlx.core.int64"] = "I64"


def _tower(name):
    """The first module that tells text from towers: all of some releases lies in one model."""
    whole = name.startswith(_IN_ONE_MODEL)
    return (name.removeprefix("model.") if whole else name).partition(".")[0]


def _stripped(tree):
    """Names without the wrapper that mlx_vlm puts around a text-only model."""
    stripped = {_plain_name(name): value for name, value in tree.items()}
    assert len(stripped) == len(tree)
    return stripped


_MEDIA = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
_IN_ONE_MODEL = tuple(f"model.{name}" for name in ("language_model.", *_MEDIA))


def _plain_name(name):
    if name.startswith(_IN_ONE_MODEL):  # as mlx_vlm renames them
        name = name.removeprefix("model.").replace("language_model.", "model.", 1)
    return name.removeprefix("language_model.")


def write_zeros(plan, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(plan.config))
    for shard in plan.shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)


@pytest.mark.usefixtures("runtimes")
def test_the_tree_comparison_sees_a_wrong_target(tmp_path):
    """The same files with one parameter renamed do not load."""
    source = twin_source("qwen3")
    plan = build_plan(source, match_release(source, find("qwen3")), Options())
    write_zeros(plan, tmp_path)
    file = tmp_path / plan.shards[0].file
    file.write_bytes(file.read_bytes().replace(b".q_norm.", b".q_nurm.", 1))
    with pytest.raises(ValueError, match="q_nurm"):
        MlxRuntime.load(tmp_path, runtime="mlx_vlm")
