"""A text in windows, scored by the torch reference and by other weights in the same class.

Quantized weights are judged dense: unpacked into float32 matrices they compute what the packed
kernel computes, up to the order of accumulation, and a hundred times faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from validate.cases import PROMPTS
from validate.processor import load_tokenizer
from validate.quality import Tokens, joined, score
from validate.reference import ReferenceError, TorchReference

LENGTH: Final = 512
WINDOWS: Final = 16
_LEAST: Final = 64

Say = Callable[[str], None]


def default_text() -> str:
    """The shipped evaluation text: prose, dialogue, code, other languages; never calibrated on."""
    return (PROMPTS / "quality.txt").read_text(encoding="utf-8")


def windows_of(
    ids: Sequence[int], *, length: int = LENGTH, count: int = WINDOWS
) -> list[list[int]]:
    """Windows of one length spread evenly over a text; a short text is one window.

    Raises ReferenceError for fewer than 64 tokens.
    """
    if len(ids) < _LEAST:
        raise ReferenceError(f"the text has {len(ids)} tokens; at least {_LEAST} are needed")
    length = min(length, len(ids))
    whole = len(ids) // length
    starts = [i * whole // min(count, whole) * length for i in range(min(count, whole))]
    return [list(ids[start : start + length]) for start in starts]


class Evaluation:
    """The reference's logits on a text, kept in a folder on disk."""

    def __init__(
        self,
        source: Path,
        text: str,
        scratch: Path,
        *,
        length: int = LENGTH,
        count: int = WINDOWS,
        trust_remote_code: bool = False,
    ) -> None:
        """Run the release in ``source`` in float32; ReferenceError where it cannot be run."""
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise ReferenceError(f"{source}: no tokenizer to read text with")
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        self.windows = windows_of(ids, length=length, count=count)
        self._trust = trust_remote_code
        self._scratch = scratch
        model = TorchReference.load(source, trust_remote_code=trust_remote_code)
        for index, window in enumerate(self.windows):
            np.save(self._file(index), self._scored(model, window))
        model.close()

    def tokens(self, folder: Path) -> Tokens:
        """Score the torch checkpoint in ``folder``, computing in float32."""
        model = TorchReference.load(folder, trust_remote_code=self._trust)
        parts = [
            score(np.load(self._file(index)), self._scored(model, window), _targets(window))
            for index, window in enumerate(self.windows)
        ]
        model.close()
        return joined(parts)

    def _scored(self, model: TorchReference, window: Sequence[int]) -> np.ndarray:
        """Logits of the positions before each scored token."""
        return model.logits(window)[len(window) // 2 : -1]

    def _file(self, index: int) -> Path:
        return self._scratch / f"reference-{index}.npy"


def _targets(window: Sequence[int]) -> np.ndarray:
    return np.array(window[len(window) // 2 + 1 :])
