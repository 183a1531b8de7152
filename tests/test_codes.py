"""Codes beside the release's weights: one flipped block is told, and sound output never."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from release_helpers import make
from safetensors.numpy import load_file, save_file

from converter.diagnose.codes import codes_check
from converter.plan import Options
from converter.proof import prove
from converter.ui import Console
from quant.calibrate.text import calibration_of
from quant.recipe import QuantSpec

WEIGHTS = "model.safetensors"
DOWN = "model.layers.3.mlp.down_proj"
RECIPES = (
    ("affine", 3, 64, "mlx"),
    ("affine", 4, 32, "rtn"),
    ("affine", 5, 128, "search"),
    ("affine", 8, 64, "rtn"),
    ("affine", 4, 64, "imatrix"),
    ("affine", 3, 64, "gptq"),
    ("mxfp4", None, None, "rtn"),
    ("nvfp4", None, None, "search"),
)


@pytest.fixture(scope="module")
def outputs(tinylm, tmp_path_factory) -> dict[tuple, Path]:
    """tinylm by every recipe, from one read of it."""
    root = tmp_path_factory.mktemp("codes")
    text = root / "calibration.txt"
    text.write_text((tinylm / "calibration.txt").read_text()[:20_000])
    recipes = []
    for recipe in RECIPES:
        calibrated = recipe[3] in ("imatrix", "gptq")
        calibration = calibration_of(text, sequences=4, length=32) if calibrated else None
        recipes.append(Options(quant=QuantSpec.make(*recipe), calibration=calibration))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        made = {}
        for recipe, options in zip(RECIPES, recipes, strict=True):
            given = {"calibration_data": text} if options.calibration else {}
            (made[recipe],) = make(tinylm, root / "-".join(map(str, recipe)), options, **given)
        return made


def flip(out: Path, to: Path, row: int, group: int, module: str = DOWN) -> Path:
    """A copy with every code q of one group as n - q."""
    copy = shutil.copytree(out, to)
    settings = json.loads((copy / "config.json").read_text())["quantization"]
    words = settings["bits"] * settings["group_size"] // 32
    tensors = load_file(copy / WEIGHTS)
    codes = tensors[f"{module}.weight"].reshape(-1, tensors[f"{module}.weight"].shape[-1])
    codes[row, group * words : (group + 1) * words] ^= np.uint32(0xFFFFFFFF)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "mlx"})
    return copy


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda one: "-".join(map(str, one)))
def test_one_flipped_block_is_found_and_sound_codes_are_not_blamed(
    outputs, recipe, tinylm, tmp_path
):
    (sound,) = codes_check(outputs[recipe], tinylm)
    assert (sound.verdict, sound.value) == ("pass", 0.0)
    assert sound.metrics["groups"] > 5000
    (row,) = codes_check(flip(outputs[recipe], tmp_path / "bad", 17, 2), tinylm)
    assert (row.verdict, row.value) == ("fail", 1.0)
    assert row.note == f"{DOWN}.weight: the codes of row 17, group 2 are not those of its weights"


def test_codes_and_scales_of_nothing_are_found(outputs, tinylm, tmp_path):
    copy = shutil.copytree(outputs["affine", 4, 32, "rtn"], tmp_path / "bad")
    tensors = load_file(copy / WEIGHTS)
    for role in ("scales", "biases"):
        tensors[f"{DOWN}.{role}"][17, 2] = 0
    save_file(tensors, copy / WEIGHTS, metadata={"format": "mlx"})
    (row,) = codes_check(copy, tinylm)
    assert (row.verdict, row.value) == ("fail", 1.0)
    assert "row 17, group 2" in row.note


def test_a_third_of_a_tensor_s_groups_mirrored_is_found(outputs, tinylm, tmp_path):
    copy = shutil.copytree(outputs["affine", 4, 32, "rtn"], tmp_path / "bad")
    tensors = load_file(copy / WEIGHTS)
    codes = tensors[f"{DOWN}.weight"]
    codes[: len(codes) // 3] ^= np.uint32(0xFFFFFFFF)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "mlx"})
    (row,) = codes_check(copy, tinylm)
    assert row.verdict == "fail"
    assert row.value > 100


def test_codes_of_another_tensor_are_told(outputs, tinylm, tmp_path):
    copy = shutil.copytree(outputs["affine", 4, 32, "rtn"], tmp_path / "bad")
    tensors = load_file(copy / WEIGHTS)
    for role in ("weight", "scales", "biases"):
        up, gate = (f"model.layers.1.mlp.{name}_proj.{role}" for name in ("up", "gate"))
        tensors[up], tensors[gate] = tensors[gate], tensors[up]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "mlx"})
    (row,) = codes_check(copy, tinylm)
    assert row.verdict == "fail"
    for name in ("up", "gate"):
        assert f"model.layers.1.mlp.{name}_proj.weight holds codes of other weights" in row.note


def test_the_stock_converter_is_judged_alike(tinylm, runtimes, tmp_path):
    from mlx_lm import convert

    out = tmp_path / "stock"
    convert(str(tinylm), mlx_path=str(out), quantize=True, q_bits=4, q_group_size=64)
    (sound,) = codes_check(out, tinylm)
    assert sound.verdict == "pass"
    (row,) = codes_check(flip(out, tmp_path / "bad", 3, 1), tinylm)
    assert row.verdict == "fail"


def test_experts_are_compared_as_the_map_stacks_them(twin_of, runtimes, tmp_path):
    source = twin_of("qwen3_moe")
    (out,) = make(source, tmp_path / "out", Options(quant=QuantSpec.make("affine", 8, 32)))
    assert codes_check(out, source)[0].verdict == "pass"
    experts = "model.layers.1.mlp.switch_mlp.up_proj"
    bad = flip(out, tmp_path / "bad", 70, 0, experts)
    report = prove(bad, source=source, console=Console(quiet=True))
    assert report["verdict"] == "fail"
    (row,) = [check for check in report["checks"] if check["verdict"] == "fail"]
    told = f"{experts}.weight: the codes of row 70, group 0 are not those of its weights"
    assert (row["name"], row["note"]) == ("codes", told)


def test_plain_checkpoints_have_no_codes(tinylm_output, tinylm):
    assert codes_check(tinylm_output, tinylm) == []
