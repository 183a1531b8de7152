"""Small files that are replaced whole."""

import fcntl
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Final

_DRAFT: Final = re.compile(r"\.[0-9a-f]{16}\.partial")
"""How drafts are called: hidden, and not after their file, whose name may be as long as any can.

Each is of one call alone, for a file may have several writers, and the last one wins.
"""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers, and a power cut, see all of the old content or of the new.

    Text is written as UTF-8. A link in the place of ``path`` is replaced, not followed. Drafts that
    killed processes left in the folder go. An OSError names ``path``, whichever step failed.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        _remove_abandoned(path.parent)
        descriptor, draft = _draft_in(path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                draft.replace(path)  # while it is held
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _draft_in(folder: Path) -> tuple[int, Path]:
    """A new file, held by a lock that dies with this process."""
    while True:
        draft = folder / f".{secrets.token_hex(8)}.partial"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # Somebody may see it before it is held, and take it for one of the dead.
        with suppress(BlockingIOError, FileNotFoundError):
            _hold(descriptor)
            if os.path.samestat(os.fstat(descriptor), draft.stat()):
                return descriptor, draft
        os.close(descriptor)


def _hold(descriptor: int) -> None:
    """Lock a file; BlockingIOError where somebody else has, nothing where none can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks, on which nobody finds out who is dead
        return


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts that no process holds."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _DRAFT.fullmatch(entry.name)]:
            with suppress(OSError):
                descriptor = os.open(folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    (folder / name).unlink()
                finally:
                    os.close(descriptor)


def write_named(path: Path, content: str) -> None:
    """Write to a place that a user names: through links, whole, or straight to what is no file.

    That is a device or a pipe, which must not be replaced. Raises OSError as ``write_atomic`` does.
    """
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
    else:
        write_atomic(Path(os.path.realpath(path)), content)
