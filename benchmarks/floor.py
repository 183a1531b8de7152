"""The I/O floor: read some files once, write a number of bytes to one file, flush it.

Run as a process of its own: ``python -m benchmarks.floor OUT BYTES FILE ...``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

BLOCK = 8 << 20


def floor(out: Path, size: int, sources: Sequence[Path]) -> None:
    """Read ``sources`` in blocks and write ``size`` bytes in step with them, then fsync.

    A copy's own header may make it some bytes longer than its source.
    """
    total = sum(source.stat().st_size for source in sources)
    assert 0 < size < total + BLOCK // 2, "the output is much larger than its source"
    read = written = 0
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for block in _blocks(sources):
            read += len(block)
            due = size * read // total
            while written < due:
                written += os.pwrite(target, block[: due - written], written)
        os.fsync(target)
    finally:
        os.close(target)
    assert written == size, f"wrote {written} of {size} bytes"


def _blocks(sources: Sequence[Path]) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK))
    for source in sources:
        descriptor = os.open(source, os.O_RDONLY)
        try:
            position = 0
            while count := _read(descriptor, buffer, position):
                yield buffer[:count]
                position += count
        finally:
            os.close(descriptor)


def _read(descriptor: int, buffer: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    data = os.pread(descriptor, len(buffer), position)
    buffer[: len(data)] = data
    return len(data)


if __name__ == "__main__":
    floor(Path(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
