"""The journal: which units are on disk for certain, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAME = ".journal.jsonl"
"""Hidden, so that no sidecar of a release can have this name."""


class Journal:
    """An append-only list of finished units beside the files they went to.

    A unit is recorded only after the data it wrote has been flushed, so what the journal says is
    true even after a power cut; a torn last line is ignored.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], *, trusted: bool = True, part: str = ""
    ) -> None:
        """Open the journal in ``folder``; one of other work, or not ``trusted``, starts over.

        ``part`` names the part of the work that it is of, where it is not of all.
        """
        self.path = folder / (f"{NAME}.{part}" if part else NAME)
        self.done: set[int] = set()
        header = json.dumps(identity, sort_keys=True).encode() + b"\n"
        valid = self._load(header) if trusted else 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            os.ftruncate(self._file, valid)
            os.lseek(self._file, valid, os.SEEK_SET)
            if not valid:
                self._append(header)
        except OSError:
            self.close()
            raise

    @property
    def resumed(self) -> bool:
        """Whether earlier work was found."""
        return bool(self.done)

    def record(self, units: list[int]) -> None:
        """Add finished units, durably."""
        if units:
            self._append(json.dumps(units, separators=(",", ":")).encode() + b"\n")
            self.done.update(units)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        while line:  # a disk that fills up may take a part
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def _load(self, header: bytes) -> int:
        """Read what is there; return the length of its valid part, 0 when it is of no use."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        if not data.startswith(header):
            return 0
        valid = len(header)
        for line in data[valid:].split(b"\n")[:-1]:
            units = _units(line)
            if units is None:
                break
            self.done.update(units)
            valid += len(line) + 1
        return valid


def _units(line: bytes) -> list[int] | None:
    """The units of one line as ``record`` writes them, None for anything else."""
    try:
        units = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(units, list) and all(type(unit) is int for unit in units)
    return units if whole else None
