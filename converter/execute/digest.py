"""sha256 of files while they are being written: a thread follows what is complete from the front.

Units finish in any order; hashing goes on as far as everything before is written, reading back from
the page cache. When the last unit is done only the tail remains.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

BLOCK = 4 << 20


class Digests:
    """Digests of some open files of known sizes; a context manager that owns one thread."""

    def __init__(self, files: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        """``files`` maps names to descriptors, ``sizes`` to their final bytes."""
        self._files = dict(files)
        self._sizes = dict(sizes)
        self._states = {name: hashlib.sha256() for name in files}
        self._hashed = dict.fromkeys(files, 0)
        self._complete = dict.fromkeys(files, 0)
        self._ahead: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
        self._changed = threading.Condition()
        self._stopped = False
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, name="digest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def written(self, name: str, start: int, stop: int) -> None:
        """Bytes ``[start, stop)`` of a file are in place."""
        with self._changed:
            ahead = self._ahead[name]
            heapq.heappush(ahead, (start, stop))
            before = self._complete[name]
            while ahead and ahead[0][0] <= self._complete[name]:
                self._complete[name] = max(self._complete[name], heapq.heappop(ahead)[1])
            if self._complete[name] - before and self._complete[name] - self._hashed[name] >= BLOCK:
                self._changed.notify()

    def finish(self) -> dict[str, str]:
        """The digests in hex; every byte of every file must have been reported as written."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error
        while (name := self._behind(1)) is not None:
            self._advance(name)
        assert self._hashed == self._sizes, "a file is not complete"
        return {name: state.hexdigest() for name, state in self._states.items()}

    def _follow(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._stopped and self._behind(BLOCK) is None:
                        self._changed.wait()
                    if self._stopped:
                        return
                    name = self._behind(BLOCK)
                assert name is not None
                self._advance(name)
        except OSError as error:
            self._error = error

    def _behind(self, least: int) -> str | None:
        """A file with at least ``least`` complete bytes that are not hashed yet."""
        for name, complete in self._complete.items():
            if complete - self._hashed[name] >= least:
                return name
        return None

    def _advance(self, name: str) -> None:
        at = self._hashed[name]
        data = os.pread(self._files[name], min(BLOCK, self._complete[name] - at), at)
        if not data:
            raise OSError(f"{name}: ends at byte {at}, before its own end")
        self._states[name].update(data)
        self._hashed[name] = at + len(data)
