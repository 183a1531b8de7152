"""Videos as mlx-vlm's processor prepares them, of which both models are asked.

Releases' own processors of videos need torchvision, and nothing here depends on it: the frames go
through the runtime's, so that the rows say whether the model computes the release's numbers, and
not whether the frames are prepared as the release does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from validate.answers import Question
from validate.arrays import to_torch
from validate.cases import VIDEO_FILE, load_cases
from validate.checks import Check
from validate.runtime import MlxRuntime, RuntimeRefusal
from validate.runtime_inputs import FRAMES_PER_SECOND

PROCESSOR: Final = "video/processor"
FRAMES_OF_A_GRID: Final = 2
"""Frames that one temporal position of Qwen's towers stands for."""
_PIXELS: Final = "pixel_values_videos"
_FED: Final = (
    "both models are fed what the runtime's processor made of the frames; whether it prepares them "
    "as the release does is not known"
)


def video_questions(mlx_path: Path) -> tuple[list[Question], list[Check]]:
    """The questions about videos, and the row that says how they were prepared.

    Neither where mlx-vlm takes a video's frames for pictures, which are judged as such.
    """
    import torch

    try:
        model = MlxRuntime.load(mlx_path, runtime="mlx_vlm", lazy=True)
        if not model.takes_videos():
            return [], []
        prepared = [(case, model.media_inputs(case)) for case in load_cases(VIDEO_FILE)]
    except RuntimeRefusal as error:
        return [], [_row(f"not judged: {error}")]
    place = _token(model.config, "video")
    questions = []
    for case, found in prepared:
        inputs = to_torch(found)
        ids = tuple(int(token) for token in inputs["input_ids"][0])
        if _PIXELS not in inputs:
            return [], [_row("not judged: the runtime's processor gives frames a form of its own")]
        if place not in ids:
            return [], [_row("not judged: the chat template has no place for a video")]
        if inputs.get("video_position_ids") is not None:  # Gemma 4's class takes frames in a row
            for name in (_PIXELS, "video_position_ids"):
                inputs[name] = inputs[name].reshape(-1, *inputs[name].shape[-2:])
        if "video_second_per_grid" in inputs:  # which the runtime's processor takes from no rate
            inputs["video_second_per_grid"] = torch.full(
                inputs["video_second_per_grid"].shape, FRAMES_OF_A_GRID / FRAMES_PER_SECOND
            )
        inputs.setdefault("mm_token_type_ids", _kinds(ids, model.config))
        questions.append(Question(case, ids, inputs=inputs, borrowed=True))
    return questions, [_row(_FED)]


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
