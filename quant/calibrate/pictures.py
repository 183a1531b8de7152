"""Pictures of a calibration set: the files, and what is asked about each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quant.errors import CalibrationError

SUFFIXES: Final = (".jpeg", ".jpg", ".png", ".webp")
QUESTION: Final = "Describe this picture."
"""Asked about a picture that has no text file of its name."""
_LIMIT: Final = 1024
_LONGEST: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file and what is asked about it."""

    path: Path
    question: str


def questions_beside(folder: Path) -> set[Path]:
    """The text files that are questions: ``street.txt`` beside ``street.jpg``."""
    return {path.with_suffix(".txt") for path in _files(folder)}


def pictures_in(path: Path | None) -> tuple[Picture, ...]:
    """The pictures of a folder in name order; none for a file or the built-in text.

    Raises CalibrationError for more than 1,024 or a question that is not UTF-8 text.
    """
    found = [] if path is None or not path.is_dir() else _files(path)
    if len(found) > _LIMIT:
        raise CalibrationError(
            f"--calibration-data {path}: {len(found)} pictures; give at most {_LIMIT}"
        )
    return tuple(Picture(file, _question(file.with_suffix(".txt"))) for file in found)


def digest(pictures: Sequence[Picture]) -> str:
    """sha256 over the bytes of all pictures and their questions; empty without any."""
    if not pictures:
        return ""
    whole = hashlib.sha256()
    for picture in pictures:
        try:
            with picture.path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CalibrationError(f"--calibration-data {picture.path}: {error}") from error
        whole.update(hashlib.sha256(picture.question.encode()).digest())
    return whole.hexdigest()


def _files(folder: Path) -> list[Path]:
    files = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in files if not p.name.startswith("."))


def _question(path: Path) -> str:
    if not path.is_file():
        return QUESTION
    try:
        if path.stat().st_size > _LONGEST:
            raise CalibrationError(
                f"--calibration-data {path}: a question of over {_LONGEST} bytes"
            )
        return path.read_text(encoding="utf-8").strip() or QUESTION
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--calibration-data {path}: not UTF-8 text: {error}") from error
