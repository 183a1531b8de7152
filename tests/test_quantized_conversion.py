"""Quantized releases converted: codes kept through the map, anew with -q, plain with -d; proven."""

import json
from pathlib import Path

import numpy as np
import pytest
from quantized_twins import FORMATS, quantized_twin

from arch_maps.ops import evaluate
from converter.decode import DecodingReader, decoded
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.proof import prove
from converter.source import open_folder
from converter.ui import Console
from quant.recipe import QuantSpec

EXACT = {
    ("gpt_oss", "mxfp4"): "repacked exactly: MXFP4",
    ("qwen3", "ct-int4"): "repacked exactly: compressed-tensors int4, groups of 32",
    ("qwen3_moe", "ct-int4"): "repacked exactly: compressed-tensors int4, groups of 32",
    ("deepseek_v3", "fp8-ue8m0"): "repacked exactly: FP8 with 128x128 block scales, powers of two",
}
ROUNDED = "repacked, codes unchanged, scales and biases rounded to BF16"
FORMS = {
    "awq": f"{ROUNDED}: AWQ 4-bit, groups of 64",
    "gptq": f"{ROUNDED}: GPTQ 4-bit, groups of 64",
    "nf4": "decoded: bitsandbytes nf4, blocks of 64 (its source has no counterpart in MLX)",
    "fp8": "decoded: FP8 with 128x128 block scales (its source has no counterpart in MLX)",
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return tmp_path_factory.mktemp("twins")


def converted(release: Path, out: Path, options=Options()):  # noqa: B008
    request = Request(hf_path=str(release), mlx_path=out, recipes=(options,), workers=2)
    [result] = convert(request, Console(quiet=True))
    return result


def meant(release: Path, plan):
    """By parameter, what the map makes of the decoded release, in float32."""
    source = open_folder(release)
    view = decoded(source, dtype="F32")
    with source.open() as raw:
        reader = DecodingReader(raw, view)
        return {
            out.rule.target: np.asarray(evaluate(out.expr, reader), np.float32)
            for out in plan.outputs
        }


def written(out: Path):
    """Every parameter of an output, dequantized in float32."""
    source = open_folder(out, allow_mlx=True)
    view = decoded(source, dtype="F32")
    with source.open() as raw:
        reader = DecodingReader(raw, view)
        tensors = view.source.tensors.values()
        return {
            t.name: np.asarray(reader.read_rows(t.name, 0, t.shape[0]), np.float32) for t in tensors
        }


@pytest.mark.parametrize(("model_type", "format"), EXACT)
def test_codes_kept_through_the_map_are_exact(model_type, format, twins, tmp_path):
    """Stacked experts, split rows and transposed blocks included."""
    release = quantized_twin(model_type, format, twins)
    result = converted(release, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    became = manifest["decoding"]["became"]
    assert EXACT[model_type, format] in became.values()
    assert manifest["decoding"]["settings"] == FORMATS[format][1]
    expected, found = meant(release, result.plan), written(tmp_path / "out")
    assert set(expected) == set(found)
    assert any(out.repacked for out in result.plan.outputs)
    assert any(EXACT[model_type, format] in note for note in result.plan.notes)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("format", FORMS)
def test_other_formats(format, twins, tmp_path):
    release = quantized_twin("qwen3", format, twins)
    result = converted(release, tmp_path / "out")
    assert FORMS[format] in result.plan.origins().values()
    assert len(result.plan.origins()) == 21
    expected, found = meant(release, result.plan), written(tmp_path / "out")
    for name, values in expected.items():
        # half a last place of bfloat16: of the value, or of scale and bias, up to 15 steps each
        tolerance = np.abs(values).max() * (2.0**-6 if format in ("awq", "gptq") else 2.0**-8)
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance, err_msg=name)


def test_asked_for_formats(twins):
    """-q keeps codes where the recipe is what they are; -d keeps none."""
    release = quantized_twin("qwen3", "ct-int4", twins / "asked")

    def origins(options, **given):
        request = Request(hf_path=str(release), recipes=(options,), **given)
        plan = plan_request(request).plans[0]
        return {origin.partition(":")[0] for origin in plan.origins().values()}, plan

    same = Options(quant=QuantSpec.make("affine", 4, 32, "search"))
    found, plan = origins(same)
    assert found == {"repacked exactly"}
    other, quantized = origins(Options(quant=QuantSpec.make("affine", 4, 64)))
    assert other == {"decoded and quantized anew"}
    dropped, plain = origins(Options(dequantize=True), dequantize=True)
    assert dropped == {"decoded"}
    assert "quantization" not in plain.config
    assert "quantization_config" not in plain.config
    assert len({plan.hash, quantized.hash, plain.hash}) == 3


def test_names_say_what_was_kept(twins):
    from converter.pipeline import output_folders

    release = quantized_twin("qwen3", "gptq", twins / "named")
    variants = (Options(), Options(dtype="bfloat16", dequantize=True))
    request = Request(hf_path=str(release), recipes=variants)
    names = [str(folder) for folder in output_folders(request, plan_request(request))]
    assert names == ["qwen3-gptq-4bit", "qwen3-gptq-bf16"]


def test_an_interrupted_conversion_of_codes_resumes_to_the_same_bytes(twins, tmp_path, monkeypatch):
    from converter.execute import units

    release = quantized_twin("qwen3", "awq", twins / "resumed")
    monkeypatch.setattr(units, "UNIT_BYTES", 4096)
    whole = converted(release, tmp_path / "in strips")
    monkeypatch.setattr(units, "UNIT_BYTES", 8 << 20)
    again = converted(release, tmp_path / "whole")
    name = "model.safetensors"
    assert whole.manifest.files[name] == again.manifest.files[name]


@pytest.mark.parametrize(("model_type", "format"), [("gpt_oss", "mxfp4"), ("qwen3", "awq")])
def test_proven_against_what_the_release_means(model_type, format, twins, tmp_path):
    release = quantized_twin(model_type, format, twins / "proven")
    result = converted(release, tmp_path / "out")
    report = prove(tmp_path / "out", source=release, console=Console(quiet=True), plan=result.plan)
    assert report["verdict"] == "pass", report["checks"]
    assert {"packed kernel", "logits"} <= {check["name"] for check in report["checks"]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
