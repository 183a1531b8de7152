"""Videos: both models compute the same of the frames that the runtime's processor prepared."""

from pathlib import Path

import numpy as np
import pytest

from validate import deviations
from validate.cases import VIDEO_FILE, film, load_cases
from validate.checks import Check, Report
from validate.parity import run_parity
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


def test_a_template_without_a_place_for_videos_is_told(qwen, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(qwen[1], tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|video_pad|>", "a video"))
    questions, told = video_questions(copy)
    assert questions == []
    assert [row.note for row in told] == ["not judged: the chat template has no place for a video"]
