"""A processor that cannot prepare a picture is a row of its own; the model is judged anyway."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from validate import answers, processor_faults
from validate.arrays import to_mlx, to_torch
from validate.checks import Check, Report
from validate.libraries import missing_library
from validate.parity import run_parity
from validate.reference import ReferenceError

ABSENT = "no_such_library_anywhere"


def converted(twin: Path, out: Path) -> Path:
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console

    recipe = Options(dtype="float32")
    convert(Request(hf_path=str(twin), mlx_path=out, recipes=(recipe,)), Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def llava(twin_of, runtimes, tmp_path_factory) -> tuple[Path, Path]:
    """A twin whose stock processor fails with this version of transformers."""
    twin = twin_of("llava")
    return twin, converted(twin, tmp_path_factory.mktemp("looking") / "llava")


@pytest.fixture(scope="module")
def onevision(twin_of, runtimes, tmp_path_factory) -> tuple[Path, Path]:
    """A twin whose processors work on both sides."""
    twin = twin_of("llava_onevision")
    return twin, converted(twin, tmp_path_factory.mktemp("looking") / "llava_onevision")


def judge(pair: tuple[Path, Path]) -> Report:
    return run_parity(source=pair[0], mlx_path=pair[1], plan=None)


def row(report: Report, name: str) -> Check:
    (found,) = (check for check in report.checks if check.name == name)
    return found


def names(report: Report) -> set[str]:
    return {check.name for check in report.checks}


def test_a_documented_fault_is_stated_and_the_model_judged(llava) -> None:
    report = judge(llava)
    processor = row(report, "image/processor")
    assert processor.verdict == "info"
    assert "transformers 5 refuses" in processor.note
    assert "unexpected keyword argument 'padding'" in processor.note
    assert 0 < row(report, "image/logits").value < 1e-5
    assert 0 < row(report, "image/decode").value < 1e-5
    assert not {"image/input_ids", "image/pixel_values"} & names(report)
    assert report.verdict == "pass"


def test_the_pictures_do_reach_the_model(llava, tmp_path) -> None:
    broken = shutil.copytree(llava[1], tmp_path / "mlx")
    tensors = load_file(broken / "model.safetensors")
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][..., ::-1])  # red for blue
    save_file(tensors, broken / "model.safetensors", metadata={"format": "mlx"})
    report = judge((llava[0], broken))
    assert row(report, "image/logits").verdict == "fail"
    assert report.verdict == "fail"


def test_a_fault_that_nobody_documented_fails(llava, monkeypatch) -> None:
    monkeypatch.setattr(processor_faults, "PROCESSORS", ())
    report = judge(llava)
    assert row(report, "image/processor").verdict == "fail"
    assert row(report, "image/logits").verdict == "pass"
    assert report.verdict == "fail"


def test_another_error_than_the_documented_one_fails(llava, tmp_path) -> None:
    broken = shutil.copytree(llava[1], tmp_path / "mlx")
    for file in broken.glob("*processor_config.json"):
        file.unlink()
    report = judge((llava[0], broken))
    assert row(report, "image/processor").verdict == "fail"


def refuse(error: Exception):
    def media_inputs(*arguments, **options):
        raise ReferenceError("its processor cannot be loaded here") from error

    return media_inputs


def test_without_the_reference_s_library_both_get_the_runtime_s_pictures(
    onevision, monkeypatch
) -> None:
    assert "image/processor" not in names(judge(onevision))
    monkeypatch.setattr(
        answers, "media_inputs", refuse(ModuleNotFoundError("No module", name=ABSENT))
    )
    report = judge(onevision)
    processor = row(report, "image/processor")
    assert (processor.verdict, processor.metrics) == ("info", {"missing": ABSENT})
    assert "nothing here says whether it prepares them as the release does" in processor.note
    assert row(report, "image/logits").verdict == "pass"
    assert not {"image/input_ids", "image/pixel_values"} & names(report)


def test_a_reference_s_processor_that_fails_otherwise_fails(onevision, monkeypatch) -> None:
    monkeypatch.setattr(answers, "media_inputs", refuse(KeyError("size")))
    report = judge(onevision)
    assert row(report, "image/processor").verdict == "fail"
    assert report.verdict == "fail"
    assert "image/logits" not in names(report)


def test_two_processors_that_fail_are_named_both(llava, monkeypatch) -> None:
    monkeypatch.setattr(
        answers, "media_inputs", refuse(ModuleNotFoundError("No module", name=ABSENT))
    )
    processor = row(judge(llava), "image/processor")
    assert processor.verdict == "fail"
    assert "cannot be loaded here" in processor.note
    assert "'padding'" in processor.note


def test_pictures_in_16_bits_come_from_the_reference_too(llava, tmp_path) -> None:
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console

    out, recipe = tmp_path / "bf16", Options(dtype="bfloat16")
    convert(Request(hf_path=str(llava[0]), mlx_path=out, recipes=(recipe,)), Console(quiet=True))
    report = judge((llava[0], out))
    noise = [check for check in report.checks if check.name == "noise"]
    assert "image" in {check.modality for check in noise}
    assert json.dumps(report.to_json(), allow_nan=False)


# Which library


PLACEHOLDER = "PixtralProcessor requires the {} library but it was not found in your environment."


@pytest.mark.parametrize(
    ("error", "library"),
    [
        (ModuleNotFoundError("No module", name=f"{ABSENT}.inner"), ABSENT),
        (ImportError(PLACEHOLDER.format("No_such_library_anywhere")), ABSENT),
        (ImportError(PLACEHOLDER.format("numpy")), None),
        (ModuleNotFoundError("No module named numpy.gone", name="numpy.gone"), None),
        (ImportError("cannot import name 'x' from 'numpy'", name="numpy"), None),
        (ValueError(PLACEHOLDER.format("No_such_library_anywhere")), None),
    ],
)
def test_the_missing_library(error: Exception, library: str | None) -> None:
    assert missing_library(error) == library
    wrapped, handled = ValueError("on purpose"), ValueError("while handling")
    wrapped.__cause__, handled.__context__ = error, wrapped
    assert missing_library(handled) == library


def test_inputs_cross_frameworks() -> None:
    import mlx.core as mx
    import torch

    pixels = np.random.default_rng(0).random((1, 3, 4, 5), dtype=np.float32)
    given = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "pixel_values": torch.from_numpy(pixels),
        "tiles": [torch.zeros(2, 3), torch.ones(1, 3)],
        "mask": torch.tensor([True, False]),
        "nothing": None,
    }
    there = to_mlx(given)
    assert set(there) == {"input_ids", "pixel_values", "tiles", "mask"}
    assert [item.shape for item in there["tiles"]] == [(2, 3), (1, 3)]
    assert there["mask"].dtype == mx.bool_
    assert np.array_equal(np.array(there["pixel_values"]), pixels)
    asides = {"prompt": "text", "image_token_id": mx.array(7), "count": 3}
    back = to_torch({**there, **asides, "image_grid_hws": mx.array([[4, 6]])})
    assert set(back) == {*there, "image_grid_thw"}
    assert back["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert back["input_ids"].dtype == torch.int64
    assert back["mask"].dtype == torch.bool
    assert torch.equal(back["pixel_values"], given["pixel_values"])
