"""Streaming execution of one or several plans from a single read of the source."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from arch_maps.ops import RowReader, evaluate, row_count
from converter.calibrated import Calibrated
from converter.decode import BadCodesError
from converter.errors import PlanError
from converter.execute import units
from converter.execute.digest import Digests
from converter.execute.encode import BadValueError, encode, repack
from converter.execute.folder import explain, sync_folder
from converter.execute.journal import Journal
from converter.plan.model import Plan, Shard
from converter.source import Source

FLUSH_BYTES = 64 << 20
"""Output that waits for the disk: less keeps it idle, and a power cut loses more of more."""
_BAD_SHOWN = 20

Progress = Callable[[int, int], None]


@runtime_checkable
class CheckedReader(RowReader, Protocol):
    """A reader of files whose hashes are known only once they have been read to their ends."""

    verified: set[str]
    """Files that are complete and what they should be."""

    def noting(self, file: str, start: int) -> AbstractContextManager[set[str]]:
        """The files that this thread reads from while the context lasts.

        Its work begins at byte ``start`` of ``file``, and works begin in the order of the bytes.
        """

    def complete(self, name: str) -> None:
        """Read the rest of a file and check it; raises where it is not what it should be."""

    def watch(self, names: Iterable[str]) -> None:
        """Keep digests of these tensors as they go by, if nothing of their files has yet."""

    def digest(self, name: str) -> bytes | None:
        """Of a watched tensor's bytes; None where they have not gone by."""

    def read_in_part(self) -> list[str]:
        """Files that were read from and are not complete."""

    def abort(self) -> None:
        """Let whoever reads, or is about to, fail at once."""


@dataclass(slots=True)
class Job:
    """One plan and the folder it is executed in; only some of its ``shards``, where given.

    ``part`` names the journal where other processes make other shards in the same folder.
    """

    plan: Plan
    work: Path
    calibrated: Calibrated | None = None
    shards: tuple[Shard, ...] | None = None
    part: str = ""
    journal: Journal = field(init=False)
    files: dict[str, int] = field(init=False, default_factory=dict)
    pending: list[int] = field(init=False, default_factory=list)
    written: int = field(init=False, default=0)
    digests: Digests = field(init=False)
    _outputs: frozenset[int] = field(init=False)
    _durable: bool = field(init=False, default=True)

    def wants(self, unit: units.Unit) -> bool:
        """Whether a unit belongs to these shards and is not on disk yet."""
        return unit.output in self._outputs and unit.number not in self.journal.done

    def open(self, stamp: dict[str, Any]) -> None:
        """Open or resume: the files at their final sizes, headers written."""
        identity = {"plan": self.plan.hash, "source": stamp, "unit_bytes": units.UNIT_BYTES}
        if self.calibrated is not None:
            identity["calibration"] = self.calibrated.digest
        shards = self.plan.shards if self.shards is None else self.shards
        files = {shard.file for shard in shards}
        self._outputs = frozenset(
            number
            for number, out in enumerate(self.plan.outputs)
            if any(tensor.file in files for tensor in out.stored.values())
        )
        with explain(self.work):
            whole = True
            for shard in shards:
                descriptor, found = _open_shard(self.work / shard.file, shard)
                self.files[shard.file] = descriptor
                whole &= found
            self.journal = Journal(self.work, identity, trusted=whole, part=self.part)
            sync_folder(self.work)
        self.digests = Digests(self.files, {shard.file: shard.size for shard in shards})
        for shard in shards:
            self.digests.written(shard.file, 0, len(shard.header))

    def write(self, file: str, offset: int, array: np.ndarray) -> None:
        """Put the bytes of ``array`` at ``offset`` of ``file``, if it is one of these shards."""
        if file not in self.files:
            return
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _pwrite_all(self.files[file], flat.data, offset)
        self.digests.written(file, offset, offset + flat.nbytes)

    def already(self, done: Sequence[units.Unit]) -> None:
        """Count what an earlier run wrote of these units as written."""
        for unit in done:
            for tensor in self.plan.outputs[unit.output].stored.values():
                if tensor.file not in self.files:
                    continue
                row_bytes = tensor.nbytes // row_count(tensor.shape)
                start = tensor.start + unit.start * row_bytes
                stop = tensor.start + unit.stop * row_bytes
                self.digests.written(tensor.file, start, stop)

    def flush(self, lock: threading.Lock, vouched: Callable[[int], bool]) -> None:
        """Make finished units durable and record them; after a failure nothing more is recorded.

        A system reports lost writes once only: the next flush would succeed without them. A unit
        that is not ``vouched`` for, because what it was made of is not, waits for a later flush.
        """
        if not self._durable:
            return
        self._durable = False
        with lock:  # workers go on meanwhile; what they finish now waits for the next flush
            finished = [unit for unit in self.pending if vouched(unit)]
            self.pending = sorted(set(self.pending) - set(finished))
            self.written = 0
        for descriptor in self.files.values():
            _datasync(descriptor)
        self.journal.record(finished)
        self._durable = True

    def close(self) -> None:
        """Close all files, of a job that failed to open as well."""
        if hasattr(self, "journal"):
            self.journal.close()
        while self.files:
            os.close(self.files.popitem()[1])


def execute(
    jobs: Sequence[Job],
    source: Source,
    *,
    reader: RowReader,
    stamp: dict[str, Any],
    workers: int,
    progress: Progress | None = None,
    checked: CheckedReader | None = None,
) -> list[dict[str, str]]:
    """Write the weight files of every job's plan; all plans share their rules.

    ``checked`` is what ``reader`` reads from in the end, where its files are not known to be whole:
    then a unit is recorded as done once all files that it came from are. Returns the sha256 of each
    job's files. Raises PlanError naming every tensor with a value that cannot be stored (the caller
    removes the work folder), ConvertError when the disk fails (the work folder stays and can
    resume), and what ``checked`` raises of a file that is not what it should be.
    """
    outputs = jobs[0].plan.outputs
    for job in jobs:
        theirs = [out.expr for out in job.plan.outputs]
        assert theirs == [out.expr for out in outputs], "variants of one map only"
    try:
        for job in jobs:
            job.open(stamp)
        with contextlib.ExitStack() as hashing:
            for job in jobs:
                hashing.enter_context(job.digests)
            trust = _Trust(checked)
            if reader is checked:  # rows are the bytes that go by
                trust.watch(_aliases(jobs[0].plan, source))
            try:
                _run(jobs, source, reader, workers, progress, trust)
            except BaseException:
                for job in jobs:  # what is done is not done again by the run that resumes
                    with contextlib.suppress(OSError):
                        job.flush(threading.Lock(), trust.vouched)
                raise
            if not any(job.part for job in jobs):  # the run that makes the output whole checks
                _check_aliases(jobs[0].plan, source, reader, trust)
            trust.complete_all()
            with explain(jobs[0].work):
                return [job.digests.finish() for job in jobs]
    finally:
        for job in jobs:
            job.close()


class _Trust:
    """Which files each unit came from, and whether those are known to be whole."""

    def __init__(self, reader: CheckedReader | None) -> None:
        self._reader = reader
        self._files: dict[int, set[str]] = {}
        self._places: Mapping[int, tuple[str, int]] = {}
        self._left: Counter[str] = Counter()

    @property
    def streamed(self) -> bool:
        """Whether files are checked while they are read."""
        return self._reader is not None

    def expect(self, places: Mapping[int, tuple[str, int]]) -> None:
        """Where each unit that is to come begins."""
        self._places = places
        self._left = Counter(file for file, _ in places.values())

    def noting(self, unit: int) -> AbstractContextManager[object]:
        """While the context lasts this thread makes ``unit``."""
        if self._reader is None:
            return contextlib.nullcontext()
        return self._noting(self._reader, unit)

    @contextlib.contextmanager
    def _noting(self, reader: CheckedReader, unit: int) -> Iterator[None]:
        with reader.noting(*self._places[unit]) as files:
            yield
        self._files[unit] = files

    def read_out(self, unit: int) -> Callable[[], None] | None:
        """A unit is done: how to complete its file, where no other of that is to come."""
        file, _ = self._places[unit]
        self._left[file] -= 1
        if self._reader is None or self._left[file]:
            return None
        return partial(self._reader.complete, file)

    def vouched(self, unit: int) -> bool:
        """Whether every byte that a unit was made of is known to be right."""
        return self._reader is None or self._files[unit] <= self._reader.verified

    def abort(self) -> None:
        """Let nobody wait any longer for what the reader reads."""
        if self._reader is not None:
            self._reader.abort()

    def watch(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Tensors that will be held against each other."""
        if self._reader is not None:
            self._reader.watch({name for pair in pairs for name in pair})

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are known to hold the same bytes from when they went by."""
        if self._reader is None or (digest := self._reader.digest(one)) is None:
            return False
        return digest == self._reader.digest(other)

    def complete_all(self) -> None:
        """Complete whatever else was read from."""
        if self._reader is not None:
            for file in self._reader.read_in_part():
                self._reader.complete(file)


def _run(
    jobs: Sequence[Job],
    source: Source,
    reader: RowReader,
    workers: int,
    progress: Progress | None,
    trust: _Trust,
) -> None:
    outputs = jobs[0].plan.outputs
    every = units.units_of(source, outputs)
    if trust.streamed:  # what arrives out of order would have to be kept until it can be hashed
        ordered = units.reading_order(source, outputs, every)
    else:
        ordered = units.writing_order(outputs, every)
    todo = [unit for unit in ordered if any(job.wants(unit) for job in jobs)]
    for job in jobs:
        job.already([unit for unit in ordered if unit.number in job.journal.done])
    total, finished = len(ordered), len(ordered) - len(todo)
    trust.expect({unit.number: units.place(source, outputs, unit) for unit in todo})
    bad: dict[int, tuple[int, str]] = {}
    lock = threading.Lock()

    def convert(unit: units.Unit) -> int:
        with trust.noting(unit.number):
            made = make(unit)
        with lock:
            for job, size in made:
                job.pending.append(unit.number)
                job.written += size
        return unit.number

    def make(unit: units.Unit) -> list[tuple[Job, int]]:
        made = {at: 0 for at, job in enumerate(jobs) if job.wants(unit)}
        expr = outputs[unit.output].expr
        # Statistics are narrowed for each call, which takes longer than the cache saves.
        whole = any(jobs[at].calibrated is not None for at in made)
        for start, stop in [(unit.start, unit.stop)] if whole else unit.pieces():
            rows: np.ndarray | None = None
            checked = False
            for at in made:
                job = jobs[at]
                try:
                    out = job.plan.outputs[unit.output]
                    if out.repacked is not None:
                        arrays = repack(out, reader, start, stop)
                    else:
                        if rows is None:
                            rows = evaluate(expr, reader, start, stop)
                        arrays = encode(
                            out, rows, start, checked=checked, calibrated=job.calibrated
                        )
                    for tensor, offset, array in arrays:
                        job.write(tensor.file, offset, array)
                        made[at] += array.nbytes
                except (BadCodesError, BadValueError) as error:
                    with lock:  # the first place in each tensor, whichever thread comes first
                        found = (start, str(error))
                        bad[unit.output] = min(found, bad.get(unit.output, found))
                    return []  # nothing of a damaged source is worth resuming
                checked = rows is not None
        return [(jobs[at], size) for at, size in made.items()]

    def flush() -> None:
        for job in jobs:
            job.flush(lock, trust.vouched)

    with (
        explain(jobs[0].work),
        ThreadPoolExecutor(1) as flusher,
        ThreadPoolExecutor(workers) as pool,
    ):
        running: set[Future[int]] = set()
        checking: set[Future[None]] = set()
        flushing: Future[None] | None = None
        queue = iter(todo)
        if progress:
            progress(finished, total)
        try:
            while True:
                while len(running) < 4 * workers and (unit := next(queue, None)) is not None:
                    running.add(pool.submit(convert, unit))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    rest = trust.read_out(future.result())
                    if rest is not None:
                        checking.add(pool.submit(rest))
                for check in [one for one in checking if one.done()]:
                    checking.remove(check)
                    check.result()
                finished += len(done)
                if progress:
                    progress(finished, total)
                if flushing is not None and flushing.done():
                    flushing.result()
                    flushing = None
                if flushing is None and sum(job.written for job in jobs) >= FLUSH_BYTES:
                    flushing = flusher.submit(flush)
            for check in checking:
                check.result()
            trust.complete_all()
        except BaseException:
            begun: list[Future[Any]] = [*running, *checking]
            for future in begun:
                future.cancel()
            trust.abort()  # workers that read are waited for below
            raise
        if bad:
            raise PlanError(_summary([text for _, text in bad.values()]))
        if flushing is not None:
            flushing.result()
        flush()


def _summary(bad: list[str]) -> list[str]:
    more = len(bad) - _BAD_SHOWN
    tail = [f"and {more} more tensors like these"] if more > 0 else []
    return sorted(bad)[:_BAD_SHOWN] + tail


def _aliases(plan: Plan, source: Source) -> list[tuple[str, str]]:
    """Each tied tensor that is dropped, with the one that it must be the same as."""
    return [
        (drop.name, drop.same_as)
        for drop in plan.drops
        if drop.same_as is not None and drop.same_as in source.tensors
    ]


def _check_aliases(plan: Plan, source: Source, reader: RowReader, trust: _Trust) -> None:
    """A dropped tied tensor must be the tensor that it is tied to, a constant one constant."""
    problems = []
    for drop in plan.drops:
        if drop.filled_with is not None:
            values = reader.read_rows(drop.name, 0, source.tensors[drop.name].shape[0])
            if (values.astype(np.float32) != drop.filled_with).any():
                problems.append(
                    f"not constant: {drop.name} is left out because it is {drop.filled_with:g} "
                    "throughout, which it is not here: the runtime cannot compute this release"
                )
    for name, tied in _aliases(plan, source):
        info = source.tensors[name]
        if info.dtype == source.tensors[tied].dtype and trust.same(name, tied):
            continue
        rows = info.shape[0]
        step = max(1, (8 << 20) * rows // max(1, info.nbytes))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            mine = reader.read_rows(name, start, stop)
            other = reader.read_rows(tied, start, stop)
            if mine.dtype != other.dtype or mine.tobytes() != other.tobytes():
                problems.append(
                    f"not tied: {name} differs from {tied}, although config.json "
                    "ties them; set tie_word_embeddings to false if both are meant"
                )
                break
    if problems:
        raise PlanError(problems)


def _open_shard(path: Path, shard: Shard) -> tuple[int, bool]:
    """A descriptor of the file at its final size, and whether it was there before."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        found = os.fstat(descriptor).st_size == shard.size
        if not found:
            _reserve(descriptor, shard.size)
        _pwrite_all(descriptor, memoryview(shard.header), 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, found


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its final size, and its place on the disk where the system can."""
    os.ftruncate(descriptor, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
                raise


def _pwrite_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:  # one call writes at most 2 GiB, and less on a disk that fills up
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _datasync(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
