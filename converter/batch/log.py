"""The log of a run: one file each, every line without secrets."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

KEPT: Final = 60
"""Log files of earlier runs that are kept."""
_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


class Redacting(logging.Formatter):
    """Formats a record, exceptions included, and takes secrets out of the result."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The record's time, in UTC."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))

    def format(self, record: logging.LogRecord) -> str:
        """The line as it may be kept."""
        from converter.hub.errors import redact

        return redact(super().format(record))


@contextmanager
def logging_to(
    folder: Path, run_id: str, *, echo: Callable[[str], None] | None = None
) -> Iterator[Callable[[str], None]]:
    """Write the lines given to the yielded function to ``folder``; ``echo`` takes them as well."""
    from converter.hub.errors import redact

    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("run-*.log"))[:-KEPT]:
        old.unlink(missing_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    handler = logging.FileHandler(folder / f"run-{stamp}-{run_id[:8]}.log", encoding="utf-8")
    handler.setFormatter(Redacting(_FORMAT))
    logger = logging.Logger(f"convert.batch.{run_id}", logging.INFO)
    logger.addHandler(handler)

    def say(line: str) -> None:
        logger.info("%s", line)
        if echo is not None:
            echo(redact(line))

    try:
        yield say
    finally:
        handler.close()
