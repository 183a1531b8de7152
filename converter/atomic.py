"""Small files that are replaced whole."""

import os
import threading
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers, and a power cut, see all of the old content or of the new.

    Text is written as UTF-8. An OSError names ``path``, whichever step failed.
    """
    data = content.encode() if isinstance(content, str) else content
    # Hidden, and of this thread alone: a file may have several writers, and the last one wins.
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
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
