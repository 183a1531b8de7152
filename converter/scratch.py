"""Folders that go with what made them; where that was killed, with the next that needs one."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Final, Literal

from converter.errors import ConvertError
from converter.execute.folder import BusyError, explain, locked

Kind = Literal["fused", "plain", "reference", "twin"]
_KINDS: Final[tuple[Kind, ...]] = ("fused", "plain", "reference", "twin")
_SUFFIX: Final = ".scratch"
_LOCKLESS: Final = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def scratch(kind: Kind, out: Path, *, parent: Path | None = None) -> Iterator[Path]:
    """An empty folder, hidden beside the output ``out`` or in ``parent``, gone with the context.

    What killed processes left of the same output goes first. Whoever lives holds a lock, which
    dies with its process, so nothing of theirs is touched. ConvertError when the disk refuses.
    """
    parent = parent or out.parent
    for one in _KINDS:
        names = parent.glob(f"{escape(_stem(one, out))}{'[0-9a-f]' * 8}.*")
        for left in {name.with_suffix(_SUFFIX) for name in names}:
            with suppress(ConvertError), locked(left):  # BusyError: its maker is at work
                shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        while True:
            place = parent / f"{_stem(kind, out)}{secrets.token_hex(4)}{_SUFFIX}"
            with suppress(BusyError):  # another took its lock, not yet held, for a dead one's
                stack.enter_context(held(place))
                break
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Make a folder and hold it as ``locked`` does, or only make it where nothing can be locked.

    On such a file system nobody finds out who is dead. BusyError while another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(place))
        except ConvertError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in _LOCKLESS:
                raise
            place.with_suffix(".lock").unlink(missing_ok=True)
            with explain(place):
                place.mkdir(exist_ok=True)
        yield


def _stem(kind: Kind, out: Path) -> str:
    return f".{out.name}.{kind}-"
