"""Memory of calibrated plans: told of, flat in layers and text, refused where it is lacking."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from golden_plans import release
from release_helpers import status
from release_plans import plan_llama

from arch_maps.registry import find
from arch_maps.rules import Kind
from converter.batch.needs import needs_of
from converter.pipeline import Request, plan_request
from converter.plan import Options, build_plan
from converter.plan.match import match_release
from converter.plan.memory import PROCESS, calibration_bytes
from quant.allocate import Allocation
from quant.calibrate.bounds import SPILL_BYTES
from quant.calibrate.memory import give_back
from quant.calibrate.text import Calibration
from quant.recipe import QuantSpec

TEXT = Calibration(sha256="0" * 64, sequences=2, length=32)


def recipe(method, **settings):
    return Options(quant=QuantSpec.make("affine", 4, method=method), calibration=TEXT, **settings)


def test_layers_and_text_do_not_add_up():
    few, many = (calibration_bytes(plan_llama(n, recipe("gptq"))) for n in (2, 40))
    assert few == many > PROCESS
    much = replace(recipe("gptq"), calibration=replace(TEXT, sequences=1 << 20))
    assert few < calibration_bytes(plan_llama(2, much)) <= few + SPILL_BYTES


def test_methods_and_targets_count():
    plans = {m: plan_llama(2, recipe(m)) for m in ("imatrix", "gptq", "autoround")}
    needed = [calibration_bytes(plan) for plan in plans.values()]
    assert needed == sorted(set(needed))
    plain = Options(quant=QuantSpec.make("affine", 4))
    assert calibration_bytes(plan_llama(2, plain)) == 0
    assert calibration_bytes(plan_llama(2, replace(plain, target_bits=5.0))) == 0
    assert calibration_bytes(plan_llama(2, recipe("rtn", target_bits=5.0))) > PROCESS
    needs = needs_of([plans["autoround"]], proof=1, source_bytes=1, fused=False, workers=1)
    assert needs["convert"] == needs["memory"] == needed[2]


def test_stacks_of_experts_count_whole(twin_of):
    found = {}
    for model_type in ("qwen3", "qwen3_moe"):
        request = Request(hf_path=str(twin_of(model_type, "bfloat16")), recipes=(recipe("gptq"),))
        plan = plan_request(request).plans[0]
        layer = sum(o.elements for o in plan.outputs if ".layers.0." in o.rule.module)
        found[model_type] = (calibration_bytes(plan) - PROCESS) / layer
    assert found["qwen3_moe"] >= 12  # three times in float32


def test_too_little_memory_is_said_before_anything_is_written(
    twin_of, tmp_path, monkeypatch, capsys
):
    source, out = twin_of("llama", "bfloat16"), tmp_path / "out"
    monkeypatch.setattr("converter.memory.installed_memory", lambda: PROCESS)
    monkeypatch.setattr("converter.refusals.installed_memory", lambda: PROCESS)
    flags = ["--hf-path", source, "-q", "--q-method", "gptq"]
    assert status(*flags, "--mlx-path", out) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "--q-method gptq: calibrating llama block by block takes about" in said
    assert "this machine has 1.2 GB; use a larger one, or --q-method search" in said
    assert not out.exists()
    assert status("plan", *flags) == 0
    assert "more than the 1.2 GB of this machine: it is refused here" in capsys.readouterr().out
    assert status("plan", *flags[:-1], "rtn") == 0
    assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("rtn", "use a larger one, or leave --calibration-data out"),
        ("gptq", "or --q-method search, which needs no calibration, and leave --calibration-data"),
    ],
)
def test_too_little_memory_is_said_before_formats_are_chosen(
    twin_of, tmp_path, monkeypatch, capsys, method, instead
):
    def never(*given, **named):
        raise AssertionError("formats were chosen first")

    monkeypatch.setattr("converter.refusals.installed_memory", lambda: PROCESS)
    monkeypatch.setattr("converter.pipeline.allocated", never)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 2000)
    flags = ["--hf-path", twin_of("llama", "bfloat16"), "-q", "--q-method", method]
    flags += ["--q-target-bpw", "5.5", "--calibration-data", text]
    assert status(*flags, "--mlx-path", tmp_path / "out") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "--q-target-bpw 5.5: calibrating llama block by block takes about" in said
    assert instead in said


def test_formats_that_are_chosen_need_no_memory():
    for method in ("rtn", "search", "gptq"):
        draft = recipe(method, target_bits=5.0)
        specs = {o.rule.module: draft.quant for o in plan_llama(2, draft).outputs}
        chosen = Allocation(
            specs=specs, base=draft.quant, basis="activations", losses="0" * 64, expected=0.1
        )
        plan = plan_llama(2, replace(draft, allocation=chosen))
        once = calibration_bytes(plan_llama(2, recipe("gptq"))) if method == "gptq" else 0
        assert calibration_bytes(plan) == once <= calibration_bytes(plan_llama(2, draft))


@pytest.mark.parametrize("model_type", ["gemma3n", "gemma4", "gemma4_text"])
def test_of_several_tables_the_head_s_is_calibrated(model_type):
    source = release(model_type).source()
    match = match_release(source, find(model_type))
    for method in ("imatrix", "gptq"):
        plan = build_plan(source, match, recipe(method))
        tables = [o for o in plan.outputs if o.rule.kind is Kind.EMBEDDING and o.quant]
        head, *others = tables
        assert head.rule.module.endswith("embed_tokens")
        assert (head.quant.method, [o.quant.method for o in others]) == (method, ["search"])
        assert any("1 embeddings that are only looked up" in note for note in plan.notes)


def test_tables_that_are_only_looked_up_are_loaded_and_no_more():
    source = release("gemma4").source()
    plan = build_plan(source, match_release(source, find("gemma4")), recipe("gptq"))
    head, looked_up = (o.elements for o in plan.outputs if o.rule.kind is Kind.EMBEDDING)
    most = max(16 * head, 6 * looked_up)
    assert most < calibration_bytes(plan) - PROCESS < 1.01 * most < 16 * looked_up


def test_rows_of_tables_in_blocks_are_no_outputs():
    source = release("qwen4_exp").source()  # millions of n-grams in a block
    match = match_release(source, find("qwen4_exp"))
    for options in (recipe("autoround"), recipe("rtn", target_bits=5.0)):
        plan = build_plan(source, match, options)
        longer = replace(options, calibration=replace(TEXT, length=2048))
        assert calibration_bytes(replace(plan, options=longer)) < 1.1 * calibration_bytes(plan)


def test_tables_in_blocks_are_no_values():
    """Read by rows: 51 billion n-grams more or less make no difference."""
    source = release("qwen4_exp").source()
    match = match_release(source, find("qwen4_exp"))
    for options in (recipe("imatrix"), recipe("gptq"), recipe("rtn", target_bits=5.0)):
        plan = build_plan(source, match, options)
        tables = [out for out in plan.outputs if "ngram_embedding" in out.rule.module]
        without = tuple(out for out in plan.outputs if out not in tables)
        assert sum(out.elements for out in tables) > 1 << 35
        assert calibration_bytes(plan) == calibration_bytes(replace(plan, outputs=without))


_BETWEEN = """
import os
import numpy as np
from quant.calibrate.memory import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

pieces = [np.ones(64 << 10, np.uint8) for _ in range(1024)]
held = pieces[::16]
del pieces
before = resident()
give_back()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's own measure")
def test_free_memory_between_pieces_in_use_goes_back():
    done = subprocess.run([sys.executable, "-c", _BETWEEN], capture_output=True, text=True)
    assert int(done.stdout) > 40 << 20, done.stderr


@pytest.mark.parametrize(
    ("known", "given"),
    [("malloc_trim", (0,)), ("malloc_zone_pressure_relief", (None, 0)), (None, None)],
)
def test_each_system_is_asked_in_its_own_way(monkeypatch, known, given):
    asked = []

    def call(*words):
        asked.append(tuple(getattr(word, "value", word) for word in words))

    library = SimpleNamespace(**({known: call} if known else {}))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    give_back()
    assert asked == ([given] if known else [])
