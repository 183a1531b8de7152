"""Videos as mlx-vlm's processor prepares them, of which both models are asked.

Releases' own processors of videos need torchvision, and nothing here depends on it: the frames go
through the runtime's, so that the rows say whether the model computes the release's numbers, and
not whether the frames are prepared as the release does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from validate.answers import Question
from validate.arrays import to_torch
from validate.cases import VIDEO_FILE, load_cases
from validate.checks import Check
from validate.runtime import MlxRuntime, RuntimeRefusal
from validate.runtime_inputs import FRAMES_PER_SECOND, media_inputs

PROCESSOR: Final = "video/processor"
FRAMES_OF_A_GRID: Final = 2
"""Frames that one temporal position of Qwen's towers stands for."""
_PIXELS: Final = "pixel_values_videos"
_TAKEN: Final = ("input_ids", "attention_mask")
_SHOWN: Final = 300
_FED: Final = (
    "both models are fed what the runtime's processor made of the frames; whether it prepares them "
    "as the release does is not known"
)


def video_questions(
    mlx_path: Path, *, source: Path, trust_remote_code: bool = False
) -> tuple[list[Question], list[Check]]:
    """The questions about videos, and the row that says how they were prepared.

    Neither where mlx-vlm takes a video's frames for pictures, which are judged as such. The row
    fails where the output's files make no question and those of ``source`` do.
    """
    try:
        model = MlxRuntime.load(
            mlx_path, runtime="mlx_vlm", lazy=True, trust_remote_code=trust_remote_code
        )
        if not model.takes_videos():
            return [], []
    except RuntimeRefusal as error:
        return [], [_row(f"not judged: {error}")]
    try:
        return _asked(model, mlx_path), [_row(_FED)]
    except _Unasked as error:
        problem = str(error)
    try:
        _asked(model, source)
    except _Unasked:
        return [], [_row(f"not judged: {problem}")]
    note = f"{problem}, while the release's own files ask about a video in the same runtime"
    return [], [replace(_row(note), verdict="fail")]


def unanswered(error: Exception) -> Check:
    """The row of a video that torch's class does not take as the runtime prepared it."""
    told = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
    return _row(f"not judged: torch does not take what the runtime's processor made: {told}")


class _Unasked(Exception):
    """Why there is no question about a video."""


def _asked(model: MlxRuntime, folder: Path) -> list[Question]:
    """The questions as the processor in ``folder`` makes them; _Unasked where it does not."""
    places = {_token(model.config, kind) for kind in ("video", "video_start")} - {None}
    if not places:
        raise _Unasked("the config names no token for a video")
    # Frames may take the place of pictures, as those of GLM 5.3 between a video's start and end.
    places.add(_token(model.config, "image"))
    questions = []
    for case in load_cases(VIDEO_FILE):
        # A processor and its template are the release's and the runtime's: they may raise anything.
        try:
            found = media_inputs(folder, model.model.config, case, stock_prompt=False)
            inputs = to_torch({k: v for k, v in found.items() if k in _TAKEN or _PIXELS in found})
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
            raise _Unasked(f"the runtime's processor takes no video ({told})") from error
        if _PIXELS not in inputs:
            raise _Unasked("the runtime's processor gives frames a form of its own")
        ids = tuple(int(token) for token in inputs["input_ids"][0])
        if places.isdisjoint(ids):
            raise _Unasked("the chat template has no place for a video")
        _as_released(inputs)
        inputs.setdefault("mm_token_type_ids", _kinds(ids, model.config))
        questions.append(Question(case, ids, inputs=inputs, borrowed=True))
    return questions


def _as_released(inputs: dict[str, Any]) -> None:
    """Give ``inputs`` the shapes and the clock that the release's own processor would."""
    import torch

    if inputs.get("video_position_ids") is not None:  # Gemma 4's class takes frames in a row
        for name in (_PIXELS, "video_position_ids"):
            inputs[name] = inputs[name].reshape(-1, *inputs[name].shape[-2:])
    if "video_second_per_grid" in inputs:  # which the runtime's processor takes from no rate
        shape = inputs["video_second_per_grid"].shape
        seconds = FRAMES_OF_A_GRID / FRAMES_PER_SECOND
        inputs["video_second_per_grid"] = torch.full(shape, seconds)


def _row(note: str) -> Check:
    return Check(PROCESSOR, "video", "info", runtime="mlx_vlm", note=note)


def _kinds(ids: Sequence[int], config: Mapping[str, Any]) -> Any:
    """What transformers' processors tell of each token: 0 text, 1 a picture, 2 a video."""
    import torch

    kinds = {_token(config, "image"): 1, _token(config, "video"): 2}
    return torch.tensor([[kinds.get(token, 0) for token in ids]])


def _token(config: Mapping[str, Any], kind: str) -> int | None:
    """The id that stands for a part of a picture or a video in a prompt."""
    for part in (config, config.get("thinker_config") or {}):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if part.get(name) is not None:
                return int(part[name])
    return None
