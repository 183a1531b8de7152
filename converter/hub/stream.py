"""Tensor bytes by range requests straight from the hub, each file's hash checked as it goes by.

Files are read in windows of fixed places, some ahead of what is asked for. A window is hashed into
its file's hash when everything before it has been; what was needed out of order is read once more
for that, and must then be the same bytes, which a digest of every window that was ever handed out
makes sure of. So whatever a caller was given is vouched for once its file is complete.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from converter.errors import HubError, PlanError
from converter.source.header import TensorInfo
from converter.source.reader import Reader

if TYPE_CHECKING:
    from converter.hub.snapshot import HubFile, HubSnapshot

WINDOW: Final = 16 << 20
"""Bytes of one request: a hub that allows 3,000 in five minutes then gives 168 MB/s."""
KEPT: Final = 8
"""Windows in memory beside those that are just arriving."""
AHEAD: Final = 2
"""Windows that are asked for before they are needed."""
CONNECTIONS: Final = 4
Fetch = Callable[[str, int, int], bytes]
"""Bytes [start, stop) of a file; raises HubError once trying again has not helped."""


@dataclass(slots=True)
class _Progress:
    """How much of a file is hashed, and a digest of every window that was read so far."""

    file: HubFile
    hash: hashlib._Hash
    windows: int
    head: hashlib._Hash
    """Of the header alone, which ends at ``head_stop``."""
    head_stop: int
    next: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class StreamReader(Reader):
    """Tensors by name from a repository at one commit; share one among threads.

    Memory is bounded by ``KEPT`` windows however large a tensor is. What has been read is vouched
    for by ``complete`` alone; see there.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        snapshot: HubSnapshot,
        *,
        headers: Mapping[str, str],
        fetch: Fetch,
    ) -> None:
        """``headers`` are the sha256 of the files' headers by which everything was planned."""
        super().__init__(tensors, {})
        self._headers = headers
        self._stops: dict[str, int] = {}
        for info in tensors.values():  # a file's first tensor lies where its header ends
            self._stops[info.file] = min(info.start, self._stops.get(info.file, info.start))
        self._snapshot = snapshot
        self._fetch = fetch
        self._state: dict[str, _Progress] = {}
        self._ready: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._loading: dict[tuple[str, int], Future[bytes]] = {}
        self._noted = threading.local()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="stream")
        self.verified: set[str] = set()
        """Files of which every byte was read in this run, and whose hash is the hub's."""

    def close(self) -> None:
        """Stop reading; reading afterwards is a programming error."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()

    @contextmanager
    def noting(self) -> Iterator[set[str]]:
        """The files that this thread reads from while the context lasts."""
        files: set[str] = set()
        self._noted.files = files
        try:
            yield files
        finally:
            self._noted.files = None

    def complete(self, name: str) -> None:
        """Read what is left of a file and compare its hash with the hub's.

        Raises HubError where they differ; then nothing that was read from the file is of use. A
        file from which nothing was read is left alone.
        """
        with self._lock:
            state = self._state.get(name)
        if state is None or name in self.verified:
            return
        while state.next < state.windows:
            for number in range(state.next, min(state.windows, state.next + AHEAD)):
                self._ask(state, number)
            self._window(state, state.next)
            self._advance(state)
        actual = state.hash.hexdigest()
        expected = state.file.sha256 or state.file.blob_id
        if actual != expected:
            raise self._damaged(name, f"its hash is {actual}, the hub announced {expected}")
        if state.head.hexdigest() != self._headers[name]:
            raise self._damaged(name, "its header is not the one that was planned with")
        self.verified.add(name)

    def read_in_part(self) -> list[str]:
        """Files from which something was read and that are not complete yet."""
        with self._lock:
            return [name for name in self._state if name not in self.verified]

    def _fill(self, info: TensorInfo, position: int, view: memoryview) -> None:
        if not len(view):
            return
        noted: set[str] | None = getattr(self._noted, "files", None)
        if noted is not None:
            noted.add(info.file)
        state = self._progress(info.file)
        done = 0
        while done < len(view):
            number, skipped = divmod(position + done, WINDOW)
            if number >= state.windows:
                raise PlanError([f"{info.file}: {info.name}: lies beyond the end of the file"])
            for ahead in range(number + 1, min(state.windows, number + 1 + AHEAD)):
                if ahead not in state.digests:  # every byte is wanted once, for the hash
                    self._ask(state, ahead)
            data = self._window(state, number)
            part = memoryview(data)[skipped : skipped + len(view) - done]
            if not len(part):
                raise PlanError([f"{info.file}: {info.name}: lies beyond the end of the file"])
            view[done : done + len(part)] = part
            done += len(part)

    def _progress(self, name: str) -> _Progress:
        with self._lock:
            assert not self._closed, "the reader is closed"
            if name not in self._state:
                file = self._snapshot.file(name)
                state = hashlib.sha256()
                if file.sha256 is None:  # as git hashes what is no LFS file
                    state = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
                windows = -(-file.size // WINDOW)
                stop = self._stops[name]
                self._state[name] = _Progress(file, state, windows, hashlib.sha256(), stop)
            return self._state[name]

    def _window(self, state: _Progress, number: int) -> bytes:
        found = self._ask(state, number)
        return found if isinstance(found, bytes) else found.result()

    def _ask(self, state: _Progress, number: int) -> bytes | Future[bytes]:
        """A window that is in memory, or what will be one."""
        key = (state.file.path, number)
        with self._lock:
            if key in self._ready:
                self._ready.move_to_end(key)
                return self._ready[key]
            if key not in self._loading:
                self._loading[key] = self._pool.submit(self._load, state, number)
            return self._loading[key]

    def _load(self, state: _Progress, number: int) -> bytes:
        key = (state.file.path, number)
        try:
            start = number * WINDOW
            data = self._fetch(key[0], start, min(state.file.size, start + WINDOW))
            digest = hashlib.sha256(data).digest()
            with self._lock:
                if state.digests.setdefault(number, digest) != digest:
                    raise self._damaged(key[0], f"bytes from {start} differ when read again")
                self._ready[key] = data
                while len(self._ready) > KEPT:
                    hashed = (k for k in self._ready if k[1] < self._state[k[0]].next)
                    del self._ready[next(hashed, next(iter(self._ready)))]
        finally:
            with self._lock:
                self._loading.pop(key, None)
        self._advance(state)
        return data

    def _advance(self, state: _Progress) -> None:
        """Hash on as far as the windows that come next are in memory."""
        with state.lock:
            while state.next < state.windows:
                with self._lock:
                    data = self._ready.get((state.file.path, state.next))
                if data is None:
                    return
                state.hash.update(data)
                state.head.update(data[: max(0, state.head_stop - state.next * WINDOW)])
                state.next += 1

    def _damaged(self, name: str, what: str) -> HubError:
        return HubError(
            f"{name} of {self._snapshot.repo_id} arrived damaged: {what}. Nothing that was made of "
            "it is kept; run the same command again, and it goes on with the files that arrived "
            "whole."
        )


def open_stream(
    snapshot: HubSnapshot,
    tensors: Mapping[str, TensorInfo],
    *,
    headers: Mapping[str, str],
    token: str | None = None,
) -> StreamReader:
    """A reader of ``tensors`` from the repository that ``snapshot`` pins to a commit."""
    from converter.hub.snapshot import fetch_window

    def fetch(path: str, start: int, stop: int) -> bytes:
        return fetch_window(snapshot, path, start, stop, token=token)

    return StreamReader(tensors, snapshot, headers=headers, fetch=fetch)
