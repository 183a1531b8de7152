"""What is spoken for on this machine: bytes of disk and memory, reserved before they are used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from converter.memory import installed_memory
from converter.ui import size_text


class Budget:
    """Reservations by key, within a limit that may shrink and grow."""

    def __init__(self, what: str, limit: Callable[[], int]) -> None:
        """``limit`` gives the bytes that may be used when nothing is reserved."""
        self.what = what
        self._limit = limit
        self._held: dict[object, int] = {}

    @property
    def limit(self) -> int:
        """Bytes that may be used when nothing is reserved."""
        return self._limit()

    @property
    def left(self) -> int:
        """Bytes of it that nobody has reserved now."""
        return max(0, self._limit() - sum(self._held.values()))

    def reserve(self, key: object, size: int) -> bool:
        """Set bytes aside; False when others have too much of it now."""
        others = sum(held for other, held in self._held.items() if other != key)
        if others + size > self._limit():
            return False
        self._held[key] = size
        return True

    def free(self, key: object) -> None:
        """End a reservation, if there is one."""
        self._held.pop(key, None)

    def refusal(self, size: int) -> str | None:
        """Why so much cannot be had even alone, None when it can."""
        limit = self._limit()
        if size <= limit or self._held:
            return None
        return f"needs {size_text(size)} of {self.what} and may use {size_text(limit)}"


def disk(folder: Path, budget: int | None) -> Budget:
    """The disk that holds ``folder``: what is free there, at most ``budget``."""

    def limit() -> int:
        free = shutil.disk_usage(folder).free
        return free if budget is None else min(free, budget)

    return Budget("disk", limit)


def memory(budget: int | None) -> Budget:
    """The memory of this machine or container: ``budget``, or four fifths of all there is."""
    limit = installed_memory() * 4 // 5 if budget is None else budget
    return Budget("memory", lambda: limit)
