"""Videos: both models compute the same of the frames that the runtime's processor prepared."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from validate import deviations
from validate.cases import VIDEO_FILE, film, load_cases
from validate.checks import Check, Report
from validate.parity import run_parity
from validate.reference import TorchReference
from validate.watching import video_questions


@pytest.fixture(scope="module")
def qwen(twin_of, runtimes, tmp_path_factory) -> tuple[Path, Path]:
    """A twin whose runtime counts the positions of a video otherwise than the release."""
    from converter.pipeline import Request, convert
    from converter.plan import Options
    from converter.ui import Console

    twin, out = twin_of("qwen2_5_vl"), tmp_path_factory.mktemp("watching") / "out"
    recipe = Options(dtype="float32")
    convert(Request(hf_path=str(twin), mlx_path=out, recipes=(recipe,)), Console(quiet=True))
    return twin, out


def rows(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks if check.modality == "video"}


def test_frames_show_something_that_moves() -> None:
    (case,) = load_cases(VIDEO_FILE)
    frames = film(case)
    assert frames.shape == (case.frames, case.height, case.width, 3)
    red = np.all(frames == (220, 40, 50), axis=-1)
    places = [float(np.argwhere(one).mean(axis=0)[1]) for one in red]
    assert places == sorted(places)
    assert places[-1] - places[0] > case.width / 3


def test_a_video_is_judged_and_the_runtimes_clock_named(qwen) -> None:
    found = rows(run_parity(source=qwen[0], mlx_path=qwen[1], plan=None))
    assert "fed what the runtime's processor made" in found["video/processor"].note
    assert "by seconds" in found["deviation"].note
    assert found["deviation"].value > 1e-2
    for name in ("video/logits", "video/decode", "video/greedy"):
        assert found[name].verdict == "pass", found[name]


def test_an_unknown_fault_in_videos_fails(qwen, monkeypatch) -> None:
    others = tuple(one for one in deviations.DOCUMENTED if one.modality != "video")
    monkeypatch.setattr(deviations, "DOCUMENTED", others)
    report = run_parity(source=qwen[0], mlx_path=qwen[1], plan=None)
    assert rows(report)["video/logits"].verdict == "fail"
    assert report.verdict == "fail"


def mute(folder: Path, to: Path) -> Path:
    """A copy whose chat template has no place for a video."""
    copy = shutil.copytree(folder, to)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|video_pad|>", "a video"))
    return copy


def test_a_release_without_a_place_for_videos_is_not_judged_by_them(qwen, tmp_path: Path) -> None:
    source, out = mute(qwen[0], tmp_path / "source"), mute(qwen[1], tmp_path / "out")
    questions, (told,) = video_questions(out, source=source)
    assert questions == []
    assert told.note == "not judged: the chat template has no place for a video"
    assert told.verdict == "info"


def test_an_output_that_lost_its_place_for_videos_fails(qwen, tmp_path: Path) -> None:
    out = mute(qwen[1], tmp_path / "out")
    _, (told,) = video_questions(out, source=qwen[0])
    assert told.verdict == "fail"
    assert "the release's own files ask about a video" in told.note


def test_what_torch_does_not_take_ends_no_proof(qwen, monkeypatch) -> None:
    def refuse(self, inputs):
        if "pixel_values_videos" in inputs:
            raise RuntimeError("shape mismatch: [3, 16] and [3, 26]")
        return stock(self, inputs)

    stock = TorchReference.forward
    monkeypatch.setattr(TorchReference, "forward", refuse)
    report = run_parity(source=qwen[0], mlx_path=qwen[1], plan=None)
    found = rows(report)
    assert list(found) == ["video/processor"]
    assert "shape mismatch" in found["video/processor"].note
    assert report.verdict == "pass"
