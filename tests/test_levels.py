"""Sounds as levels: what two processors make of them, and what a judge says of a difference."""

from importlib import import_module

import numpy as np
import pytest
import torch

from validate import deviations, listening
from validate.cases import load_cases
from validate.runtime import prepare_mlx
from validate.sounds import SAMPLING_RATE, synthesise

prepare_mlx()
LEVELS = np.linspace(-7, 2, 16)


def levels(features) -> np.ndarray:
    return np.abs(np.clip(np.asarray(features), -7, 2)[..., None] - LEVELS).argmin(-1)


@pytest.fixture(scope="module")
def extractors():
    """The release's and the runtime's, each with its own defaults, which are the same."""
    ours = import_module("mlx_vlm.models.inkling.audio_feature_extractor")
    theirs = import_module("transformers.models.inkling.feature_extraction_inkling")
    return theirs.InklingFeatureExtractor(), ours.InklingAudioFeatureExtractor()


def unlike(extractors, sound: np.ndarray) -> float:
    theirs, ours = (
        levels(one([sound], sampling_rate=SAMPLING_RATE)["input_features"]) for one in extractors
    )
    assert theirs.shape == ours.shape
    return float(np.mean(theirs != ours))


def test_only_quiet_sounds_get_other_levels_and_the_floor_is_why(extractors) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(SAMPLING_RATE).astype(np.float32)
    assert unlike(extractors, noise) == 0
    sounds = [synthesise(case) for case in load_cases("audio.json")]
    sounds.append(np.zeros(SAMPLING_RATE, np.float32))
    assert min(unlike(extractors, sound) for sound in sounds) > 0.1
    (known,) = deviations.deviations_for("mlx_vlm", model_type="inkling_mm_model", modality="audio")
    with deviations.without([known], model=None):
        assert max(unlike(extractors, sound) for sound in sounds) < 2e-3


def test_levels_are_compared_one_by_one() -> None:
    sound = torch.arange(12).reshape(1, 3, 4)
    ids = {"input_ids": torch.tensor([[1, 2]])}
    other = np.array(sound.tolist())
    other[0, 1, 2] += 1
    compare = listening._compare_features
    reference = {**ids, "audio_input_ids": sound}
    assert compare(reference, {"audio_input_ids": sound.tolist()})[0] == 0
    assert compare(reference, {"audio_input_ids": other})[0] == 1 / 12
    assert compare(reference, {"audio_input_ids": other[:, :2]})[0] == float("inf")
    assert compare(ids, ids)[0] == float("inf")


def test_a_judge_names_the_floor_and_feeds_both_the_same_levels(twin_of, tmp_path) -> None:
    from converter.pipeline import Request, convert
    from converter.ui import Console
    from validate.parity import run_parity

    twin = twin_of("inkling_mm_model")
    convert(Request(hf_path=str(twin), mlx_path=tmp_path / "mlx"), Console(quiet=True))
    report = run_parity(source=twin, mlx_path=tmp_path / "mlx", plan=None, images=False)
    rows = {check.name: check for check in report.checks if check.modality == "audio"}
    assert report.verdict == "pass"
    assert rows["deviation"].value > 0.1
    assert "1e-5" in rows["deviation"].note
    assert 0 < rows["audio/input_features"].value < 2e-3
    assert rows["audio/input_features"].verdict == "info"
    assert rows["audio/logits"].value < 1e-4
