"""Sounds are judged like pictures: through both processors, and a planted fault shows in them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from validate.cases import Case, load_cases
from validate.checks import Report
from validate.modalities import hears, sees
from validate.parity import run_parity
from validate.pixels import compare_pixels
from validate.runtime import prepare_mlx
from validate.sounds import SAMPLING_RATE, synthesise

prepare_mlx()
AUDIO = {"audio/logits", "audio/decode", "audio/greedy"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A twin that hears, and its conversion."""
    from converter.pipeline import Request, convert
    from converter.ui import Console
    from validate.twin import load_example, make_twin

    root = tmp_path_factory.mktemp("sounds")
    twin = make_twin(load_example("gemma4"), root / "twin").path
    convert(Request(hf_path=str(twin), mlx_path=root / "mlx"), Console(quiet=True))
    return twin, root / "mlx"


def judge(twin: Path, mlx: Path) -> Report:
    return run_parity(source=twin, mlx_path=mlx, plan="sha256:plan", images=False)


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "fail"}


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
def test_sounds_through_both_processors(pair: tuple[Path, Path]) -> None:
    report = judge(*pair)
    assert report.verdict == "pass", failed(report)
    rows = {check.name: check for check in report.checks if check.modality == "audio"}
    assert set(rows) >= AUDIO
    assert rows["audio/logits"].value < 1e-4
    assert rows["audio/input_ids"].value == rows["audio/input_features"].value == 0
    # The stock processor counts one token too many for the length of one prompt.
    assert rows["deviation"].verdict == "info"
    assert [c.name for c in rows["deviation"].cases if c.value > 0.01] == ["short"]


@pytest.mark.filterwarnings("ignore:At least one mel filter:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "audio_tower.subsample_conv_projection.layer1.conv.weight",
        "audio_tower.layers.0.lconv1d.depthwise_conv1d.weight",
    ],
)
def test_a_wrong_audio_weight_fails_only_sounds(pair, tmp_path: Path, name: str) -> None:
    twin, mlx = pair
    broken = Path(shutil.copytree(mlx, tmp_path / "mlx"))
    tensors = load_file(broken / "model.safetensors")
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])
    save_file(tensors, broken / "model.safetensors", metadata={"format": "mlx"})
    assert {"audio/logits"} <= failed(judge(twin, broken)) <= AUDIO | {"deviation"}


def test_waveforms_are_deterministic_and_never_the_same_twice() -> None:
    waves = [synthesise(case) for case in load_cases("audio.json")]
    for wave, case in zip(waves, load_cases("audio.json"), strict=True):
        assert wave.dtype == np.float32
        assert len(wave) == case.samples
        assert np.array_equal(wave, synthesise(case))
        assert 0.2 < np.abs(wave).max() <= 1.0
        frames = wave[: len(wave) // 640 * 640].reshape(-1, 640)
        assert len(np.unique(frames.round(4), axis=0)) == len(frames)
    assert {len(wave) % 640 for wave in waves} == {0, 100, 420}


def test_the_chirp_rises() -> None:
    wave = synthesise(Case("rise", "audio", samples=SAMPLING_RATE))
    spectra = [np.abs(np.fft.rfft(part)) for part in np.split(wave, 8)]
    centres = [float((s * np.arange(len(s))).sum() / s.sum()) for s in spectra]
    assert centres == sorted(centres)


@pytest.mark.parametrize(
    ("config", "seen", "heard"),
    [
        ({}, False, False),
        ({"vision_config": {"depth": 1}, "audio_config": None}, True, False),
        ({"audio_config": {"layers": 1}}, False, True),
        ({"thinker_config": {"vision_config": {"a": 1}, "audio_config": {"a": 1}}}, True, True),
    ],
)
def test_what_a_config_can_be_asked_about(config, seen: bool, heard: bool) -> None:
    assert sees(config) is seen
    assert hears(config) is heard


def test_a_picture_cut_into_padded_patches_is_the_same_picture() -> None:
    picture = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    tiles = picture.reshape(3, 2, 2, 3, 2).transpose(1, 3, 2, 4, 0).reshape(6, 12)
    padded = np.concatenate([tiles, np.zeros((3, 12), np.float32)])[None]
    assert compare_pixels(padded, picture[None]) == (0.0, "cut into patches")
    assert compare_pixels(padded[:, ::-1], picture[None])[0] > 0.1
    assert compare_pixels(padded[:, :5], picture[None])[0] == float("inf")


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_sounds_of_a_release_without_a_class_run_in_the_runtime(twin_of, tmp_path):
    """They are heard: finite numbers, and the same whole and token by token."""
    from converter.pipeline import Request, convert
    from converter.ui import Console

    twin, out = twin_of("minicpmo"), tmp_path / "out"
    convert(Request(hf_path=str(twin), mlx_path=out), Console(quiet=True))
    report = run_parity(source=twin, mlx_path=out, plan=None)
    assert report.verdict == "unproven"
    rows = {check.name: check.verdict for check in report.checks if check.modality == "audio"}
    assert rows == {"audio/finite": "pass", "audio/prefill = decode": "pass"}
