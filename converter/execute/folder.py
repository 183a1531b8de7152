"""The work folder beside the output: locked, resumable, and renamed only when whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.errors import ConvertError, UsageError
from quant.locks import lock

MANIFEST = "conversion.json"


class BusyError(UsageError):
    """Another process holds what this one needs; later it will not."""


def work_folder(out: Path, plan_hash: str) -> Path:
    """The folder in which the plan is executed before it becomes ``out``."""
    out = _absolute(out)
    return out.parent / f".{out.name}.{plan_hash[:12]}.partial"


def check_output(out: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that would destroy something; raises UsageError."""
    if source is not None:
        real, origin = out.resolve(), source.resolve()
        if real == origin or real in origin.parents or origin in real.parents:
            raise UsageError(
                f"{out}: the output and the source {source} overlap; choose another --mlx-path"
            )
    if Path.cwd().is_relative_to(_absolute(out)):
        raise UsageError(
            f"{out}: is the current folder or holds it, and the output replaces a folder as a "
            "whole; choose another --mlx-path"
        )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: exists and is no folder; choose another --mlx-path")
    if out.exists() and any(out.iterdir()) and not overwrite:
        finished = (out / MANIFEST).exists()
        what = "holds a finished conversion" if finished else "is not empty"
        raise UsageError(f"{out}: {what}; use --overwrite to replace it, or another --mlx-path")


@contextmanager
def locked(work: Path, *, flag: str = "--mlx-path") -> Iterator[None]:
    """Make the work folder and hold it against other processes; the lock dies with its process.

    The lock file goes at the end; one that a killed process left is empty and locks nothing.
    ``flag`` chooses the place, for errors.
    """
    path = work.with_suffix(".lock")  # beside the folder, which is renamed while it is held
    with _held(path, work, flag=flag):
        yield


@contextmanager
def sharing(work: Path, part: str) -> Iterator[None]:
    """Make the work folder and hold one part of it, while nobody holds the whole.

    Other processes may hold other parts at the same time.
    """
    with (
        _held(work.with_suffix(".lock"), work, shared=True),
        _held(work.with_suffix(f".{part}.lock"), work),
    ):
        yield


@contextmanager
def _held(
    path: Path, work: Path, *, shared: bool = False, flag: str = "--mlx-path"
) -> Iterator[None]:
    with explain(work, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path, shared=shared)
        if descriptor is None:
            raise BusyError(
                f"{work}: another process is working on the same conversion; wait for it"
            )
    try:
        with explain(work, flag):
            work.mkdir(exist_ok=True)
        yield
    finally:
        if not shared:  # the run that makes the output whole has this file alone, and removes it
            path.unlink(missing_ok=True)
        os.close(descriptor)


def publish(work: Path, out: Path) -> None:
    """Make the finished work folder the output: flush, rename, flush the parent.

    What ``out`` held before is removed last; a kill in between leaves it in a hidden folder,
    which the next run removes.
    """
    out = _absolute(out)
    old = out.parent / f".{out.name}.replaced"
    sync_tree(work)
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        out.rename(old)
    work.rename(out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)


def _absolute(path: Path) -> Path:
    """The path with a name of its own, which ``.`` and ``a/..`` lack."""
    return Path(os.path.abspath(path))


def sync_tree(root: Path) -> None:
    """Flush every file and folder below ``root``."""
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(folder))


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, where the platform can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explain(path: Path, flag: str = "--mlx-path") -> Iterator[None]:
    """Turn an operating system error into one readable paragraph; ``flag`` chooses the place."""
    try:
        yield
    except OSError as error:
        raise ConvertError(os_error_text(error, path, flag)) from error


def os_error_text(error: OSError, path: Path, flag: str = "--mlx-path") -> str:
    """What went wrong with a file that is written, and what to do."""
    where = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}: the disk is full. Nothing unfinished looks finished: free some space and "
            "run the same command again; it goes on where it stopped."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: no permission to write here; choose another {flag}."
    if error.errno == errno.EFBIG:
        return (
            f"{where}: files as large as this output's are not allowed here, by the file system "
            f"or by a limit (ulimit -f); choose another {flag}."
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{where}: a part of this path is a file, not a folder; choose another {flag}."
    return f"{where}: {error.strerror or error}"
