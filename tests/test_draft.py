"""Drafted maps against the written ones, which the drafting does not see."""

import numpy as np
import pytest
from header_fixtures import fixtures
from test_maps import twin_source
from tracing import Numbered, plain

from arch_maps.facts import Facts
from arch_maps.ops import evaluate, sources
from arch_maps.registry import find
from converter.cli.errors import run
from converter.draft import draft, near
from converter.errors import PlanError
from converter.maps import load_map
from converter.plan.match import match_release

pytestmark = pytest.mark.usefixtures("runtimes")
DRAFTED = [
    "qwen3/Qwen3-0.6B",
    "mixtral/Mixtral-8x7B-v0.1",
    "qwen3_5_text/Qwen3.5-27B-text",
    "phi3/phi-4",
    "granitemoe/granite-3.1-1b-a400m",
    "gpt_neox/pythia-1.4b",
    "llama/Llama-2-7b-hf",
    "qwen2_vl/Qwen2-VL",
]


def fixture_of(name):
    return next(f for f in fixtures() if f.id == name)


@pytest.fixture(autouse=True)
def no_neighbours(monkeypatch):
    """Drafts that look at no written map at all."""
    monkeypatch.setattr("converter.draft.nearest", lambda rules: [])


def drafted_map(fixture, folder):
    path = folder / "drafted.py"
    path.write_text(draft(fixture.source()).text)
    return load_map(path, fixture.config)


@pytest.mark.parametrize("name", DRAFTED)
def test_a_draft_says_what_the_written_map_says(name, tmp_path):
    """On the release it was drafted from, and on another size of the type: its twin's."""
    fixture = fixture_of(name)
    arch, written = drafted_map(fixture, tmp_path), find(fixture.model_type)
    match_release(fixture.source(), arch)  # total, on the release's own headers

    small = twin_source(fixture.model_type)
    facts = Facts(small.config)
    mine = {plain(r.target): r for r in arch.expand(facts, arch.layouts[0]).rules}
    theirs = {plain(r.target): r for r in match_release(small, written).rules}
    assert facts.problems == []
    only_written = set(theirs) - set(mine)
    assert only_written <= {"lm_head.weight"}  # a tied head that the map stores for mlx-vlm
    assert set(mine) <= set(theirs)
    for target, rule in mine.items():
        expected = theirs[target].expr
        assert tuple(rule.expr.shape) == tuple(expected.shape), target
        leaves = {
            leaf.name: tuple(map(int, leaf.shape))
            for one in (rule.expr, expected)
            for leaf in sources(one)
        }
        numbered = Numbered(leaves)
        values = evaluate(rule.expr, numbered), evaluate(expected, numbered)
        np.testing.assert_array_equal(*values, err_msg=target)


def test_a_draft_reads_like_a_written_map():
    text = draft(fixture_of("mixtral/Mixtral-8x7B-v0.1").source()).text
    assert text.startswith('"""mixtral: drafted from the loader of mlx-')
    assert (
        '        layer.linear("block_sparse_moe.gate", num_local_experts, hidden_size, kind' in text
    )
    assert "for i in range(num_local_experts)" in text
    assert '    root.norm("model.norm", hidden_size)' in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_draft_tells_layers_apart_by_the_config():
    text = draft(fixture_of("qwen3_5/Qwen3.6-27B").source()).text
    assert "        if (index + 1) % full_attention_interval == 0:" in text
    assert 'layer.norm("input_layernorm", hidden_size, offset=1.0)' in text
    assert "hidden_size * vision_spatial_merge_size" in text
    assert '"mtp.fc.weight", 5120, 10240' in text


def test_a_draft_lists_what_the_loader_leaves_out():
    drafted = draft(fixture_of("llama/Llama-2-7b-hf").source())
    assert len(drafted.dropped) == 32
    assert "    for index in range(32):\n        root.drop(" in drafted.text
    assert 'f"model.layers.{index}.self_attn.rotary_emb.inv_freq"' in drafted.text


def test_what_no_loader_takes_is_refused():
    with pytest.raises(PlanError, match=r"--map runtime: mlx_lm cannot run the release: .*c_attn"):
        draft(fixture_of("gpt2/gpt2").source())


def test_the_nearest_types_are_those_with_the_same_layers():
    rules = match_release(twin_source("qwen3"), find("qwen3")).rules
    first, *rest = near.nearest(rules)
    assert first == "qwen3 (text.llama), 100% in common"
    assert rest


def test_the_commands(twin_of, tmp_path, capsys, monkeypatch):
    from converter.cli.app import cli

    def convert(*words):
        return run(lambda: cli.main(list(words), standalone_mode=False))

    source, out = str(twin_of("qwen3")), tmp_path / "draft.py"
    assert convert("maps", "draft", source, "--out", str(out)) == 0
    assert convert("maps", "draft", source, "--out", str(out)) == 2
    capsys.readouterr()
    assert convert("maps", "check", source, "--map-file", str(out)) == 0
    told = capsys.readouterr().out
    assert "35 tensors make 35 parameters" in told
    assert "4-bit: every parameter is loaded as it is written by mlx-lm" in told
    out.write_text(
        out.read_text().replace('"self_attn.q_norm", head_dim', '"self_attn.q_norms", 1')
    )
    assert convert("maps", "check", source, "--map-file", str(out)) == 3
    assert "missing: model.layers.{0-2}.self_attn.q_norms.weight" in capsys.readouterr().err
    # Total on the release's side, but the runtime has no such parameters.
    out.write_text(
        "from dataclasses import replace\nfrom arch_maps.registry import find\n"
        'from arch_maps.rules import Mount\nold = find("qwen3")\n'
        "def tensors(root, facts, layout):\n    old.tensors(root, facts, layout)\n"
        "    for i, rule in enumerate(root.out.rules):\n"
        '        target = rule.target.replace("q_norm", "q_nurm")\n'
        "        root.out.rules[i] = replace(rule, target=target)\n"
        "MAP = replace(old, tensors=tensors)\n"
    )
    assert convert("maps", "check", source, "--map-file", str(out)) == 3
    assert "q_nurm" in capsys.readouterr().err
