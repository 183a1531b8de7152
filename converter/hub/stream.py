"""Tensor bytes by range requests straight from the hub, each file's hash checked as it goes by.

Files are read in windows of fixed places, some ahead of what is asked for. A window is hashed into
its file's hash when everything before it has been; what was needed out of order is read once more
for that, and must then be the same bytes, which a digest of every window that was ever handed out
makes sure of. So whatever a caller was given is vouched for once its file is complete.

Threads take turns: one reads at a time, with all connections, and of those that wait it is the one
whose work began first. Together they would want windows from everywhere at once, more than are
kept, and most would be fetched twice: once for the thread, once for the hash.

The first window that does not come, whatever was tried, ends the reading of all threads.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from mmap import mmap
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
CONNECTIONS: Final = 4
AHEAD: Final = CONNECTIONS - 1
"""Windows that are asked for before they are needed."""
Window = bytes | bytearray | mmap
Fetch = Callable[[str, int, int], Window]
"""Bytes [start, stop) of a file; raises HubError once trying again has not helped."""


_Asked = Window | Future[Window]


@dataclass(frozen=True, slots=True)
class _Watched:
    """Bytes [start, stop) of a file, hashed for themselves as they go by."""

    start: int
    stop: int
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def update(self, window: Window, start: int) -> None:
        """Take what is in the window that begins at byte ``start``; windows come in order."""
        low, high = max(self.start - start, 0), min(self.stop - start, len(window))
        if low < high:
            self.hash.update(memoryview(window)[low:high])


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
    watched: list[_Watched] = field(default_factory=list)
    digests: dict[int, bytes] = field(default_factory=dict)
    passed: set[int] = field(default_factory=set)
    """Windows that were read to their ends: who reads front to back needs them no more."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _Work:
    """What a thread reads for, where it begins, and the files that it read from."""

    ticket: int
    file: str = ""
    window: int = 0
    files: set[str] = field(default_factory=set)


class _Turns:
    """One thread at a time; of those that wait, the one with the lowest ticket."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._taken = False
        self._tickets = count()

    def ticket(self) -> int:
        """A number above all that were given before."""
        return next(self._tickets)

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Wait for the turn of ``ticket``, which no other thread waits with, and hold it."""
        with self._changed:
            heapq.heappush(self._waiting, ticket)
            try:
                self._changed.wait_for(lambda: not self._taken and self._waiting[0] == ticket)
            except BaseException:  # who is interrupted stands in nobody's way
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
                raise
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


class StreamReader(Reader):
    """Tensors by name from a repository at one commit; share one among threads.

    Memory is bounded by ``KEPT`` and ``AHEAD`` windows however large a tensor is. What has been
    read is vouched for by ``complete`` alone; see there.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        snapshot: HubSnapshot,
        *,
        headers: Mapping[str, str],
        fetch: Fetch,
        stopped: threading.Event | None = None,
    ) -> None:
        """``headers`` are the sha256 of the files' headers by which everything was planned.

        ``stopped`` is set once nothing more is read, and what ``fetch`` waits on.
        """
        super().__init__(tensors, {})
        self._headers = headers
        self._stops: dict[str, int] = {}
        for info in tensors.values():  # a file's first tensor lies where its header ends
            self._stops[info.file] = min(info.start, self._stops.get(info.file, info.start))
        self._snapshot = snapshot
        self._fetch = fetch
        self._state: dict[str, _Progress] = {}
        self._watched: dict[str, _Watched] = {}
        self._ready: OrderedDict[tuple[str, int], Window] = OrderedDict()
        self._loading: dict[tuple[str, int], Future[Window]] = {}
        self._failure: BaseException | None = None
        self._stopped = stopped or threading.Event()
        self._noted = threading.local()
        self._turns = _Turns()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="stream")
        self.verified: set[str] = set()
        """Files of which every byte was read in this run, and whose hash is the hub's."""

    def close(self) -> None:
        """Stop reading; reading afterwards is a programming error."""
        self.abort()
        self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()

    def abort(self, failure: BaseException | None = None) -> None:
        """Let whoever reads, or is about to, fail at once with the first ``failure`` there was."""
        with self._lock:
            if self._failure is None:
                self._failure = failure or HubError("Reading from the hub was stopped.")
        self._stopped.set()

    @contextmanager
    def noting(self, file: str, start: int) -> Iterator[set[str]]:
        """The files that this thread reads from while the context lasts, on one ticket.

        Its work begins at byte ``start`` of ``file``. What lies before that and was not read is
        nobody's: of works that begin in the order of the bytes none will begin there any more.
        """
        work = _Work(self._turns.ticket(), file, start // WINDOW)
        self._noted.work = work
        try:
            yield work.files
        finally:
            self._noted.work = None

    def watch(self, names: Iterable[str]) -> None:
        """Hash these tensors by themselves, too, as far as nothing of their files has gone by."""
        with self._lock:
            for info in (self._tensors[name] for name in names):
                if info.file not in self._state:
                    self._watched[info.name] = _Watched(info.start, info.stop)

    def digest(self, name: str) -> bytes | None:
        """The sha256 of a watched tensor's bytes; None where its file is not known to be whole."""
        if name not in self._watched or self._tensors[name].file not in self.verified:
            return None
        return self._watched[name].hash.digest()

    def complete(self, name: str) -> None:
        """Read what is left of a file and compare its hash with the hub's.

        Raises HubError where they differ; then nothing that was read from the file is of use. A
        file from which nothing was read is left alone.
        """
        with self._lock:
            state = self._state.get(name)
        if state is None or name in self.verified:
            return
        ticket = self._turns.ticket()
        while state.next < state.windows:  # between windows others have their turn
            with self._turns.turn(ticket):
                self._hash_up_to(state, min(state.windows, state.next + 1), state.windows)
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
        work: _Work = getattr(self._noted, "work", None) or _Work(self._turns.ticket())
        work.files.add(info.file)
        with self._turns.turn(work.ticket):
            state = self._progress(info.file)
            if info.file == work.file:
                self._hash_up_to(state, work.window)
            self._copy(state, info, position, view)

    def _hash_up_to(self, state: _Progress, stop: int, end: int | None = None) -> None:
        """Read what is left of a file before window ``stop``, for the hash alone.

        Windows are asked for ahead up to ``end``, by default ``stop``.
        """
        while (number := state.next) < stop:
            for ahead in range(number, min(end or stop, number + 1 + AHEAD)):
                self._ask(state, ahead)
            self._window(state, number)
            state.passed.add(number)
            self._advance(state)

    def _copy(self, state: _Progress, info: TensorInfo, position: int, view: memoryview) -> None:
        done = 0
        last = (position + len(view) - 1) // WINDOW
        held: dict[int, _Asked] = {}  # what is asked for ahead is not asked for again
        while done < len(view):
            number, skipped = divmod(position + done, WINDOW)
            if number >= state.windows:
                raise PlanError([f"{info.file}: {info.name}: lies beyond the end of the file"])
            found = held.pop(number, None) or self._ask(state, number)
            for ahead in range(number + 1, min(state.windows, number + 1 + AHEAD)):
                if ahead <= last:
                    held[ahead] = held.get(ahead) or self._ask(state, ahead)
                elif ahead not in state.digests:  # every byte is wanted once, for the hash
                    self._ask(state, ahead)
            data = found.result() if isinstance(found, Future) else found
            part = memoryview(data)[skipped : skipped + len(view) - done]
            if not len(part):
                raise PlanError([f"{info.file}: {info.name}: lies beyond the end of the file"])
            view[done : done + len(part)] = part
            done += len(part)
            if skipped + len(part) == len(data):
                state.passed.add(number)

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
                beside = [w for t, w in self._watched.items() if self._tensors[t].file == name]
                self._state[name] = _Progress(
                    file, state, windows, hashlib.sha256(), stop, watched=beside
                )
            return self._state[name]

    def _window(self, state: _Progress, number: int) -> Window:
        found = self._ask(state, number)
        return found.result() if isinstance(found, Future) else found

    def _ask(self, state: _Progress, number: int) -> _Asked:
        """A window that is in memory, or what will be one."""
        key = (state.file.path, number)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if key in self._ready:
                self._ready.move_to_end(key)
                return self._ready[key]
            if key not in self._loading:
                self._loading[key] = self._pool.submit(self._load, state, number)
            return self._loading[key]

    def _load(self, state: _Progress, number: int) -> Window:
        key = (state.file.path, number)
        try:
            if self._failure is not None:
                raise self._failure
            start = number * WINDOW
            data = self._fetch(key[0], start, min(state.file.size, start + WINDOW))
            digest = hashlib.sha256(data).digest()
            with self._lock:
                if state.digests.setdefault(number, digest) != digest:
                    raise self._damaged(key[0], f"bytes from {start} differ when read again")
                self._ready[key] = data
                while len(self._ready) > KEPT:
                    del self._ready[min(self._ready, key=self._use)]
        except BaseException as error:
            self.abort(error)
            raise
        finally:
            with self._lock:
                self._loading.pop(key, None)
        self._advance(state)
        return data

    def _use(self, key: tuple[str, int]) -> int:
        """What a window in memory may still serve: nothing, a reader, or the hash as well."""
        state = self._state[key[0]]
        return 2 if key[1] >= state.next else 0 if key[1] in state.passed else 1

    def _advance(self, state: _Progress) -> None:
        """Hash on as far as the windows that come next are in memory."""
        with state.lock:
            while state.next < state.windows:
                with self._lock:
                    data = self._ready.get((state.file.path, state.next))
                if data is None:
                    return
                state.hash.update(data)
                for watched in state.watched:
                    watched.update(data, state.next * WINDOW)
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

    stopped = threading.Event()

    def fetch(path: str, start: int, stop: int) -> mmap:
        return fetch_window(snapshot, path, start, stop, token=token, stopped=stopped)

    return StreamReader(tensors, snapshot, headers=headers, fetch=fetch, stopped=stopped)
