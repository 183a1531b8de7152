"""Reads tensor bytes at known offsets, from any number of threads."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from arch_maps.dtypes import NUMPY_DTYPES
from converter.errors import PlanError
from converter.source.header import TensorInfo

_SKIPPED = 12 << 10
_SPAN = 4 << 20
_HAS_PREADV = hasattr(os, "preadv")


class Reader:
    """Tensors by name from open files; share one among threads, close it when all are done."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        files: Mapping[str, tuple[Path, int]],
        *,
        scratch: object = None,
    ) -> None:
        """``files`` maps each file to its path and the size it had when its header was read.

        ``scratch`` is only held: it deletes unpacked copies when nothing refers to it any more.
        """
        self._scratch = scratch
        self._tensors = tensors
        self._files = files
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; reading afterwards is a programming error."""
        with self._lock:
            self._closed = True
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The whole tensor, in its own dtype and shape."""
        info = self._tensors[name]
        return self._array(info, 0, info.nbytes, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows ``start:stop`` along axis 0; a 0-d tensor counts as one row and is read whole."""
        info = self._tensors[name]
        if not info.shape:
            assert (start, stop) == (0, 1), f"{name} is a scalar: rows {start}:{stop}"
            return self.read(name)
        rows = info.shape[0]
        assert 0 <= start <= stop <= rows, f"{name} has {rows} rows: {start}:{stop}"
        row_bytes = info.nbytes // rows if rows else 0
        shape = (stop - start, *info.shape[1:])
        return self._array(info, start * row_bytes, stop * row_bytes, shape)

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Columns ``start:stop`` of a matrix, in bounded memory.

        Short rows are read whole, a few megabytes at a time: a call costs as much as copying
        ``_SKIPPED`` bytes.
        """
        info = self._tensors[name]
        rows, columns = info.shape
        assert 0 <= start <= stop <= columns, f"{name} has {columns} columns: {start}:{stop}"
        out = np.empty((rows, stop - start), NUMPY_DTYPES[info.dtype])
        whole, wanted = columns * out.itemsize, (stop - start) * out.itemsize
        if whole - wanted <= _SKIPPED:
            step = max(1, _SPAN // max(1, whole))
            for row in range(0, rows, step):
                last = min(rows, row + step)
                out[row:last] = self.read_rows(name, row, last)[:, start:stop]
            return out
        at = info.start + start * out.itemsize
        flat = out.view(np.uint8)
        for row in range(rows if wanted else 0):
            self._fill(info, at + row * whole, flat[row].data)
        return out

    def pread_into(self, name: str, offset: int, buffer: Any) -> None:
        """Fill the writable bytes ``buffer`` from byte ``offset`` of the tensor."""
        info = self._tensors[name]
        view = memoryview(buffer).cast("B")
        assert 0 <= offset <= info.nbytes - len(view), f"{name}: outside the tensor"
        self._fill(info, info.start + offset, view)

    def _array(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        flat = np.empty(stop - start, np.uint8)
        self._fill(info, info.start + start, flat.data)
        return flat.view(NUMPY_DTYPES[info.dtype]).reshape(shape)

    def _fill(self, info: TensorInfo, position: int, view: memoryview) -> None:
        if not len(view):
            return
        descriptor = self._descriptor(info.file)
        done = 0
        while done < len(view):  # One call returns at most 2 GiB on Linux.
            try:
                count = _pread(descriptor, view[done:], position + done)
            except OSError as error:
                raise PlanError([f"{info.file}: {info.name}: {error.strerror}"]) from error
            if count == 0:
                raise PlanError(
                    [
                        f"{info.file}: {info.name}: short read: the file ends at byte "
                        f"{position + done}, {len(view) - done} bytes early"
                    ]
                )
            done += count

    def _descriptor(self, file: str) -> int:
        with self._lock:
            assert not self._closed, "the reader is closed"
            if file not in self._descriptors:
                self._descriptors[file] = _open(file, *self._files[file])
            return self._descriptors[file]


def _open(file: str, path: Path, size: int) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise PlanError([f"{file}: cannot be read: {error.strerror}"]) from error
    found = os.fstat(descriptor).st_size
    if found != size:
        os.close(descriptor)
        raise PlanError([f"{file}: changed since it was planned: {found} bytes, was {size}"])
    return descriptor


def _pread(descriptor: int, view: memoryview, position: int) -> int:
    if _HAS_PREADV:
        return os.preadv(descriptor, [view], position)
    data = os.pread(descriptor, min(len(view), 1 << 24), position)
    view[: len(data)] = data
    return len(data)
