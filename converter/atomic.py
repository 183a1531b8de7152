"""Small files that are replaced whole."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers, and a power cut, see all of the old content or of the new.

    Text is written as UTF-8. A link in the place of ``path`` is replaced, not followed. An OSError
    names ``path``, whichever step failed.
    """
    data = content.encode() if isinstance(content, str) else content
    # Hidden, and of this call alone: a file may have several writers, and the last one wins. Not
    # named after ``path``, whose name may be as long as names can be.
    draft = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_named(path: Path, content: str) -> None:
    """Write to a place that a user names: through links, whole, or straight to what is no file.

    That is a device or a pipe, which must not be replaced. Raises OSError as ``write_atomic`` does.
    """
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
    else:
        write_atomic(Path(os.path.realpath(path)), content)
