"""The fixed prompts and generated pictures that both sides are asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

PROMPTS: Final = Path(__file__).parent / "prompts"
TEXT_FILES: Final = ("text.json", "code.json", "unicode.json", "chat.json")
MEDIA_FILES: Final = {"image": "images.json", "audio": "audio.json"}
"""Prompts about generated pictures and sounds, by modality."""
VIDEO_FILE: Final = "videos.json"
MEDIA: Final = frozenset((*MEDIA_FILES, "video"))
"""Modalities that are prepared by a processor."""


@dataclass(frozen=True)
class Case:
    """One prompt: plain text, a conversation, or a question about a generated medium."""

    name: str
    modality: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) pairs; empty for plain text."""
    width: int = 0
    height: int = 0
    samples: int = 0
    """Length of the sound, at 16 kHz."""
    frames: int = 0
    """Length of the video."""

    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]


def load_cases(*files: str) -> list[Case]:
    """The prompts of the named files in ``validate/prompts``."""
    cases = []
    for file in files:
        data = json.loads((PROMPTS / file).read_text(encoding="utf-8"))
        for prompt in data["prompts"]:
            messages = tuple((m["role"], m["content"]) for m in prompt.get("messages", ()))
            cases.append(
                Case(
                    name=prompt["name"],
                    modality=data["modality"],
                    text=prompt.get("text", ""),
                    messages=messages,
                    width=prompt.get("width", 0),
                    height=prompt.get("height", 0),
                    samples=prompt.get("samples", 0),
                    frames=prompt.get("frames", 0),
                )
            )
    return cases


def bounded(ids: Sequence[int], *, vocab_size: int) -> list[int]:
    """Cut token ids so that logits of a large vocabulary stay below 64 MB per prompt."""
    return list(ids)[: max(32, min(160, (1 << 24) // max(1, vocab_size)))]


def byte_ids(text: str, *, vocab_size: int) -> list[int]:
    """Token ids for a checkpoint without a tokenizer: the text's UTF-8 bytes, spread over the ids.

    The multiplier only makes neighbouring bytes land far apart in the vocabulary.
    """
    return [(byte * 2654435761 + 17) % vocab_size for byte in text.encode("utf-8")]


def media_question(case: Case) -> list[dict[str, Any]]:
    """One user message of a medium and a question, as chat templates take it."""
    content = [{"type": case.modality}, {"type": "text", "text": case.text}]
    return [{"role": "user", "content": content}]


def draw(case: Case) -> "Image":
    """A deterministic RGB picture: a two-way gradient, an ellipse, a box, a triangle and lines."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = case.width, case.height
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack(
        [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + 2 * y) % 256], axis=-1
    )
    picture = Image.fromarray(ramp.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 10, height // 8, width // 2, height // 2), fill=(220, 40, 50))
    pen.rectangle((width // 2, height // 3, width * 9 // 10, height * 3 // 4), fill=(30, 80, 200))
    pen.polygon(
        [(width // 4, height * 9 // 10), (width // 2, height // 2), (width * 3 // 4, height - 2)],
        fill=(250, 210, 40),
    )
    for step in range(0, width, 17):
        pen.line((step, 0, width - step, height - 1), fill=(step % 256, 255, 128), width=1)
    return picture


def film(case: Case) -> "NDArray[Any]":
    """Deterministic RGB frames [frames, rows, columns, 3]: a disc that crosses a still gradient."""
    import numpy as np

    y, x = np.mgrid[0 : case.height, 0 : case.width]
    still = np.stack(
        [x * 255 // max(1, case.width - 1), y * 255 // max(1, case.height - 1), (x + 2 * y) % 256],
        axis=-1,
    ).astype(np.uint8)
    frames = np.repeat(still[None], case.frames, axis=0)
    radius = case.height // 5
    for number, frame in enumerate(frames):
        part = (number + 1) / (case.frames + 1)
        disc = (x - part * case.width) ** 2 + (y - part * case.height) ** 2 < radius**2
        frame[disc] = (220, 40, 50)
    return frames
