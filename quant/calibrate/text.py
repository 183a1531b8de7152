"""Calibration text: which bytes, which tokens, and the digest that a plan records."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from quant.calibrate.pictures import digest, pictures_in, questions_beside
from quant.errors import CalibrationError as CalibrationError

DEFAULT_SEQUENCES = 64
DEFAULT_LENGTH = 512
_SUFFIXES = {".txt", ".md", ".json", ".jsonl", ".py"}
_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What calibrates, as a plan records it: text and pictures by sha256, and how much text."""

    sha256: str
    sequences: int = DEFAULT_SEQUENCES
    length: int = DEFAULT_LENGTH
    pictures: str = ""
    """Of the pictures and the questions about them; empty without any."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        pictures = {"pictures": self.pictures} if self.pictures else {}
        return {
            "text": self.sha256,
            "sequences": self.sequences,
            "length": self.length,
            **pictures,
        }


def read_text(path: Path | None) -> str:
    """The text of a file, of all text files of a folder in name order, or the built-in text.

    Questions about a folder's pictures are no text of it; one with pictures alone has the built-in
    text. Raises CalibrationError naming what cannot be read.
    """
    if path is None:
        return (files("quant.calibrate") / "data" / "default.txt").read_text(encoding="utf-8")
    if not path.exists():
        raise CalibrationError(f"--calibration-data {path}: no such file or folder")
    found = [path]
    if path.is_dir():
        questions = questions_beside(path)
        here = (p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        found = sorted(p for p in here if p not in questions)
        if not found and pictures_in(path):
            return read_text(None)
        if not found:
            raise CalibrationError(
                f"--calibration-data {path}: holds no text ({', '.join(sorted(_SUFFIXES))}) and "
                "no picture"
            )
    if sum(p.stat().st_size for p in found) > _LIMIT:
        raise CalibrationError(f"--calibration-data {path}: more than 64 MB of text; give less")
    try:
        text = "\n".join(p.read_text(encoding="utf-8") for p in found)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--calibration-data {path}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise CalibrationError(f"--calibration-data {path}: is empty")
    return text


def calibration_of(path: Path | None, *, sequences: int, length: int) -> Calibration:
    """What a plan records of the text and the pictures at ``path``; raises CalibrationError."""
    return Calibration(
        sha256=hashlib.sha256(read_text(path).encode()).hexdigest(),
        sequences=sequences,
        length=length,
        pictures=digest(pictures_in(path)),
    )


def tokenized(text: str, folder: Path, calibration: Calibration) -> list[list[int]]:
    """Token sequences of one length, spread evenly over the text; fewer where it is short.

    Tokenised by the release in ``folder``, without special tokens. Raises CalibrationError when
    there is no tokenizer or the text is shorter than one sequence.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CalibrationError(f"{folder}: no tokenizer to calibrate with: {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = calibration.length
    windows = len(ids) // length
    if not windows:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens, less than one sequence of {length}; "
            "give more text or a smaller --calibration-length"
        )
    count = min(windows, calibration.sequences)
    starts = [(i * windows // count) * length for i in range(count)]
    return [ids[start : start + length] for start in starts]


def model_rows(sequences: list[list[int]]) -> list[dict[str, Any]]:
    """Keyword arguments of a forward call for each token sequence."""
    import torch

    rows = [torch.tensor([ids], dtype=torch.long) for ids in sequences]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
