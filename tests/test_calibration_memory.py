"""Memory of calibrated plans: told of, flat in layers and text, refused where it is lacking."""

from dataclasses import replace

from release_helpers import status
from release_plans import plan_llama

from converter.batch.needs import needs_of
from converter.pipeline import Request, plan_request
from converter.plan import Options
from converter.plan.memory import PROCESS, calibration_bytes
from quant.calibrate.bounds import SPILL_BYTES
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
