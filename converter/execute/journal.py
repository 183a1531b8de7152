"""The journal: which units are on disk for certain, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class Journal:
    """An append-only list of finished units beside the files they went to.

    A unit is recorded only after the data it wrote has been flushed, so what the journal says is
    true even after a power cut; a torn last line is ignored.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open the journal in ``folder``; one that belongs to other work starts over."""
        self.path = folder / NAME
        self.done: set[int] = set()
        header = json.dumps(identity, sort_keys=True)
        valid = self._load(header)
        self._file = self.path.open("r+b" if valid else "wb")
        if valid:
            self._file.seek(valid)
            self._file.truncate()
        else:
            self.done.clear()
            self._file.write(header.encode() + b"\n")
            self.sync()

    @property
    def resumed(self) -> bool:
        """Whether earlier work was found."""
        return bool(self.done)

    def record(self, units: list[int]) -> None:
        """Add finished units, durably."""
        if units:
            self._file.write(json.dumps(units, separators=(",", ":")).encode() + b"\n")
            self.sync()
            self.done.update(units)

    def sync(self) -> None:
        """Flush to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _load(self, header: str) -> int:
        """Read what is there; return the length of its valid part, 0 when it is of no use."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        lines = data.split(b"\n")
        if lines[0] != header.encode() or len(lines) < 2:
            return 0
        valid = len(lines[0]) + 1
        for line in lines[1:-1]:
            try:
                self.done.update(int(unit) for unit in json.loads(line))
            except (ValueError, TypeError):
                break
            valid += len(line) + 1
        return valid
