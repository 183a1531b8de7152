"""docs/adding-an-architecture.md: its code is tested code, its commands run."""

import json
import re
import shlex
import subprocess

import example_architecture
import golden_plans
import header_fixtures
import numpy as np
import pytest
from conftest import ROOT
from expressions import Arrays
from header_fixtures import source_of

from arch_maps.facts import Facts
from arch_maps.inverse import invert
from arch_maps.ops import Source, evaluate
from converter.errors import PlanError
from converter.plan.match import match_release

DOC = (ROOT / "docs" / "adding-an-architecture.md").read_text()
CODE = (ROOT / "tests" / "example_architecture.py").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
LINES = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
CONFIG = {
    "model_type": "example",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "head_dim": 6,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
}


def release(prefix="model", table="embed_tokens"):
    """Names and shapes written out by hand."""
    shapes = {f"{prefix}.{table}.weight": (10, 8), f"{prefix}.norm.weight": (8,)}
    for i in range(2):
        shapes |= {
            f"{prefix}.layers.{i}.attn.qkv.weight": (36, 8),
            f"{prefix}.layers.{i}.attn.o_proj.weight": (8, 12),
            f"{prefix}.layers.{i}.attn.rope.inv_freq": (3,),
            f"{prefix}.layers.{i}.mlp.gate_proj.weight": (12, 8),
            f"{prefix}.layers.{i}.mlp.up_proj.weight": (12, 8),
            f"{prefix}.layers.{i}.mlp.down_proj.weight": (8, 12),
            f"{prefix}.layers.{i}.input_layernorm.weight": (8,),
            f"{prefix}.layers.{i}.post_attention_layernorm.weight": (8,),
        }
    return {name: ("F32", shape) for name, shape in shapes.items()}


def test_every_block_has_a_known_language():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert len(BLOCKS) >= 8


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_code_is_in_the_tested_file(text):
    assert text in CODE


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [(release(), "first release"), (release("transformer", "wte"), "old names")],
)
def test_example_accounts_for_both_layouts(tensors, layout):
    match = match_release(source_of(CONFIG, tensors), example_architecture.MAP)
    assert match.layout.name == layout
    assert [drop.name.rpartition(".")[2] for drop in match.drops] == ["inv_freq"] * 2


def test_example_takes_the_fused_rows_apart_and_back():
    match = match_release(source_of(CONFIG, release()), example_architecture.MAP)
    fused = np.arange(36 * 8, dtype=np.float32).reshape(36, 8)
    reader = Arrays({"model.layers.1.attn.qkv.weight": fused})
    rules = {r.target: r for r in match.rules if r.target.startswith("model.layers.1.self_attn.")}
    made = {n: evaluate(r.expr, reader) for n, r in rules.items() if "o_proj" not in n}
    key = made["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, fused[[6, 7, 8, 9, 10, 11, 24, 25, 26, 27, 28, 29]])
    solved = invert((Source(n, rules[n].expr.shape), rules[n].expr) for n in made)
    (back,) = solved.values()
    np.testing.assert_array_equal(evaluate(back, Arrays(made)), fused)


def test_the_documented_wrong_shape_message():
    config = {**CONFIG, "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4}
    with pytest.raises(PlanError) as raised:
        match_release(source_of(config, release()), example_architecture.MAP)
    quoted = "[num_attention_heads*3*head_dim=768, hidden_size=256]"
    assert quoted in DOC
    assert quoted in "\n".join(raised.value.problems)


def test_example_config_map():
    facts = Facts(CONFIG)
    out = example_architecture.MAP.config(dict(CONFIG), facts)
    assert facts.problems == []
    assert out["rope_parameters"]["rope_theta"] == out["rope_theta"] == 5e5
    facts = Facts({**CONFIG, "hidden_act": "relu"})
    example_architecture.MAP.config(dict(CONFIG), facts)
    assert "the runtimes compute SiLU only" in facts.problems[0]


def test_commands_run_as_written(tmp_path, program):
    """All but those that write into this checkout or run the tests."""
    ran = []
    for line in LINES:
        words = shlex.split(line)
        if words[0] != "convert":
            assert words[0] == "python"
            assert all((ROOT / w).exists() for w in words if w.endswith(".py"))
            continue
        done = subprocess.run(
            [*program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (line, done.stderr)
        ran.append(line)
    assert len(ran) == 5
    checks = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert checks["verdict"] == "pass"


def test_fixture_commands_write_what_they_say(tmp_path, monkeypatch, tinylm):
    monkeypatch.setattr(header_fixtures, "ROOT", tmp_path)
    header_fixtures.main([str(tinylm), "tiny"])
    header_fixtures.main(["--example", "qwen3", "Qwen3-0.6B"])
    (small, large) = sorted(header_fixtures.fixtures(), key=lambda f: len(f.tensors))
    assert small.data["origin"] == "published"
    assert small.path.stem == "tiny"
    assert large.data["origin"].endswith("meta device")
    assert len(large.tensors) == 310


def test_golden_command_writes_every_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(golden_plans, "FOLDER", tmp_path)
    monkeypatch.setattr(golden_plans, "model_types", lambda: ("bert",))
    golden_plans.main()
    written = capsys.readouterr().out.split()
    assert written == [str(tmp_path / f"plan_bert_{name}.json") for name in ("4bit", "bf16")]
