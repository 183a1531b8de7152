"""What is spoken for on this machine: bytes of disk and memory, reserved before they are used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from converter.memory import installed_memory
from converter.ui import size_text


class Budget:
    """Reservations by key, within a limit that may shrink and grow."""

    def __init__(self, what: str, room: Callable[[], int], *, most: int | None = None) -> None:
        """``room`` gives the bytes that there are when nothing is reserved, of which ``most`` may
        be used.
        """
        self.what = what
        self._room = room
        self._most = most
        self._held: dict[object, int] = {}

    @property
    def limit(self) -> int:
        """Bytes that may be used when nothing is reserved."""
        return self.limit_with(0)

    def limit_with(self, there: int) -> int:
        """The same for what has used ``there`` bytes of its own already."""
        room = self._room() + there
        return room if self._most is None else min(room, self._most)

    @property
    def left(self) -> int:
        """Bytes of it that nobody has reserved now."""
        return max(0, self.limit - sum(self._held.values()))

    def reserve(self, key: object, size: int, *, there: int = 0) -> bool:
        """Set bytes aside, ``there`` of them used already; False when others have too much."""
        others = sum(held for other, held in self._held.items() if other != key)
        if others + size > self.limit_with(there):
            return False
        self._held[key] = size
        return True

    def free(self, key: object) -> None:
        """End a reservation, if there is one."""
        self._held.pop(key, None)

    def refusal(self, size: int, *, there: int = 0) -> str | None:
        """Why so much cannot be had even alone, None when it can."""
        limit = self.limit_with(there)
        if size <= limit or self._held:
            return None
        return f"needs {size_text(size)} of {self.what} and may use {size_text(limit)}"


def disk(folder: Path, budget: int | None) -> Budget:
    """The disk that holds ``folder``: what is free there, at most ``budget``."""
    return Budget("disk", lambda: shutil.disk_usage(folder).free, most=budget)


def bytes_in(folder: Path) -> int:
    """Bytes that the files below a folder take of the disk; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has gone meanwhile
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def memory(budget: int | None) -> Budget:
    """The memory of this machine or container: ``budget``, or four fifths of all there is."""
    limit = installed_memory() * 4 // 5 if budget is None else budget
    return Budget("memory", lambda: limit)
