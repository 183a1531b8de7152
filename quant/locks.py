"""Lock files, whose locks die with their process."""

from __future__ import annotations

import os
from pathlib import Path


def lock(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the lock file ``path``, or None while another process does.

    The file is made where it is missing, and may be removed by whoever holds it alone. Raises
    OSError where the file system refuses, or cannot lock.
    """
    import fcntl

    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder removed it between the two looks
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
