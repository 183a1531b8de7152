"""Calibrated conversions: statistics, their cache, the same bytes always, and a passing proof."""

import json
from dataclasses import replace

import numpy as np
import pytest
from release_helpers import hashes, make, status, stored
from safetensors.numpy import load_file

from converter.errors import PlanError, UsageError
from converter.pipeline import Request, convert
from converter.plan import Options
from converter.proof import prove
from converter.ui import Console
from quant.calibrate.store import cache_folder
from quant.calibrate.text import Calibration, CalibrationError, calibration_of, read_text
from quant.moments import diagonal_blocks
from quant.recipe import QuantSpec

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this file's own, so that nothing comes from earlier runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tinylm, tmp_path_factory):
    """The head of the calibration text: enough for a few short sequences."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((tinylm / "calibration.txt").read_text()[:20_000])
    return path


def options(path, method, bits=4, mode="affine", **settings):
    settings = {"sequences": 4, "length": 32, **settings}
    return Options(
        quant=QuantSpec.make(mode, bits if mode == "affine" else None, None, method),
        calibration=calibration_of(path, **settings),
    )


@pytest.fixture(scope="module")
def outputs(tinylm, cache, text, tmp_path_factory):
    """tinylm by both methods."""
    root = tmp_path_factory.mktemp("calibrated")
    return {
        method: make(tinylm, root / method, options(text, method), calibration_data=text)[0]
        for method in ("imatrix", "gptq")
    }


def test_statistics_are_the_moments_that_torch_sees(outputs, tinylm, text):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quant.calibrate.text import tokenized

    (folder,) = cache_folder().glob("*.moments")
    found = {n: a for file in folder.glob("part-*") for n, a in load_file(file).items()}
    model = AutoModelForCausalLM.from_pretrained(tinylm, dtype=torch.float32)
    rows = tokenized(text.read_text(), tinylm, options(text, "imatrix").calibration)
    assert AutoTokenizer.from_pretrained(tinylm).decode(rows[0][:9]) in text.read_text()
    seen = {}
    names = ("model.layers.0.mlp.down_proj", "model.layers.5.self_attn.q_proj", "lm_head")
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0])
        )
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for name in names:
        x = torch.cat(seen[name]).double().numpy()
        expected = x.T @ x / len(x)
        if name == "lm_head":  # the table serves as an embedding too
            name = "model.embed_tokens"
            expected = expected / np.diagonal(expected).mean() + 0.3 * np.eye(len(expected))
            assert np.allclose(found[f"hessian:{name}"], expected, rtol=1e-3, atol=1e-3)
        blocks = diagonal_blocks(expected, 64)
        assert np.allclose(found[name], blocks, rtol=1e-3, atol=1e-4 * blocks.max())


def test_methods_store_the_same_tensors_in_other_values(outputs, tinylm, tmp_path):
    rtn = stored(make(tinylm, tmp_path / "rtn", Options(quant=QuantSpec.make("affine", 4)))[0])
    for method, folder in outputs.items():
        mine = stored(folder)
        assert {n: (a.dtype, a.shape) for n, a in mine.items()} == {
            n: (a.dtype, a.shape) for n, a in rtn.items()
        }
        recipe = json.loads((folder / "conversion.json").read_text())["recipe"]
        assert recipe["quantization"]["method"] == method
        assert recipe["calibration"]["sequences"] == 4
        for name in ("model.layers.0.mlp.down_proj", "model.embed_tokens"):
            assert mine[f"{name}.weight"].tobytes() != rtn[f"{name}.weight"].tobytes()


@pytest.mark.parametrize("method", ["imatrix", "gptq"])
def test_bytes_do_not_depend_on_workers_or_the_cache(
    outputs, method, tinylm, text, tmp_path, monkeypatch
):
    expected = {n: h for n, h in hashes(outputs[method]).items() if n != "conversion.json"}

    def again(name, workers):
        recipe = options(text, method)
        out = make(tinylm, tmp_path / name, recipe, calibration_data=text, workers=workers)[0]
        return {n: h for n, h in hashes(out).items() if n != "conversion.json"}

    with monkeypatch.context() as patch:
        patch.setattr("converter.execute.units.UNIT_BYTES", 30_000)
        assert again("three", 3) == expected
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert again("afresh", 1) == expected


@pytest.mark.parametrize("method", ["imatrix", "gptq"])
def test_interrupted_run_resumes_to_the_same_bytes(
    outputs, method, tinylm, text, tmp_path, monkeypatch
):
    from converter.execute.run import Job

    write, calls = Job.write, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        write(self, *arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            make(tinylm, out, options(text, method), calibration_data=text, workers=1)
    make(tinylm, out, options(text, method), calibration_data=text)
    assert hashes(out)["model.safetensors"] == hashes(outputs[method])["model.safetensors"]


def test_other_bits_need_no_new_pass(outputs, tinylm, text, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a forward pass, although the statistics are there")

    monkeypatch.setattr("quant.calibrate.stream.StreamedModel", forbidden)
    recipes = [options(text, "imatrix", 3), options(text, "imatrix", mode="mxfp4")]
    assert len(make(tinylm, tmp_path / "more", *recipes, calibration_data=text)) == 2
    make(tinylm, tmp_path / "again", options(text, "gptq"), calibration_data=text)
    with pytest.raises(AssertionError, match="although"):
        make(tinylm, tmp_path / "gptq3", options(text, "gptq", 3), calibration_data=text)
    longer = options(text, "imatrix", length=48)
    with pytest.raises(AssertionError, match="although"):
        make(tinylm, tmp_path / "longer", longer, calibration_data=text)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5"])
def test_twin_by_gptq_passes_parity(twin_of, cache, model_type, tmp_path):
    source = twin_of(model_type, "bfloat16")
    recipe = options(None, "gptq", sequences=2, length=16)
    request = Request(hf_path=str(source), mlx_path=tmp_path / "out", recipes=(recipe,))
    done = convert(request, QUIET)[0]
    report = prove(done.folder, source=source, console=QUIET, plan=done.plan)
    failed = [check for check in report["checks"] if check["verdict"] == "fail"]
    assert report["verdict"] == "pass", failed


def test_stacked_experts_are_calibrated_and_covered(twin_of, cache, text, tmp_path, capsys):
    source = twin_of("qwen3_moe", "bfloat16")
    recipe = options(text, "imatrix")
    request = Request(
        hf_path=str(source),
        mlx_path=tmp_path / "out",
        recipes=(recipe,),
        calibration_data=text,
    )
    done = convert(request, Console())[0]
    said = " ".join(capsys.readouterr().err.split())
    assert "experts' matrices saw" in said
    methods = {o.rule.target: o.quant.method for o in done.plan.outputs if o.quant}
    assert methods.pop("model.embed_tokens.weight") == "search"
    assert set(methods.values()) == {"imatrix"}
    assert any("only looked up, where all columns count" in note for note in done.plan.notes)


def test_plan_hash_follows_text_and_settings(twin_of, text):
    from converter.pipeline import plan_request

    source = str(twin_of("llama", "bfloat16"))
    base = options(text, "gptq")
    others = [
        base,
        options(text, "imatrix"),
        options(None, "gptq"),
        options(text, "gptq", length=8),
    ]
    plans = [plan_request(Request(hf_path=source, recipes=(o,))).plans[0].hash for o in others]
    assert len(set(plans)) == 4


def test_text_that_changed_after_planning_is_refused(twin_of, cache, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one " * 4000)
    recipe = options(text, "imatrix")
    text.write_text("two " * 4000)
    with pytest.raises(UsageError, match="changed since it was planned"):
        make(twin_of("llama", "bfloat16"), tmp_path / "out", recipe, calibration_data=text)


def test_calibration_text_must_be_there_and_long_enough(twin_of, cache, tmp_path):
    with pytest.raises(CalibrationError, match="no such file"):
        read_text(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no text"):
        read_text(tmp_path / "empty")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_text(tmp_path / "bad.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(PlanError, match="less than one sequence of 32"):
        make(
            twin_of("llama", "bfloat16"),
            tmp_path / "out",
            options(short, "imatrix"),
            calibration_data=short,
        )


def test_built_in_text_is_mixed_and_stable():
    text = read_text(None)
    assert 40_000 < len(text.encode()) < 120_000
    assert all(word in text for word in ("def ", '"model_type"', "Fluss", "桜", "SELECT"))
    assert (
        calibration_of(None, sequences=1, length=8).sha256
        == Calibration(sha256=calibration_of(None, sequences=2, length=9).sha256).sha256
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--calibration-data", "x"],
        ["-q", "--calibration-data", "x"],
        ["-q", "--q-method", "search", "--calibration-length", "64"],
        ["-q", "--q-method", "imatrix", "--calibration-data", "/no/such/file"],
        ["--q-method", "gptq"],
        ["-d", "--q-method", "gptq"],
        ["--variants", "bf16", "--calibration-sequences", "3"],
    ],
)
def test_contradictions_are_usage_errors(twin_of, flags, tmp_path, capsys):
    source = twin_of("llama", "bfloat16")
    out = tmp_path / "out"
    assert status("--hf-path", source, "--mlx-path", out, "--no-validate", *flags) == 2
    assert "--" in capsys.readouterr().err
    assert not out.exists()


def test_options_and_method_must_agree():
    with pytest.raises(ValueError, match="needs calibration text"):
        Options(quant=QuantSpec.make("affine", method="gptq"))
    plain = options(None, "imatrix")
    with pytest.raises(ValueError, match="has no effect"):
        replace(plain, quant=QuantSpec.make("affine"))
