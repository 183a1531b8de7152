"""Compiled loops of the decoders."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import _store

Array = npt.NDArray[Any]


@cache
def grouped_values(kind: int) -> Kernel:
    """``(codes, table, scales, zeros, minima, group, out)`` over (rows, cols).

    ``(table[code] - zero) * scale + minimum`` in float32, stored as ``kind``; groups of columns
    share the last three. ``zeros`` and ``minima`` may have no columns: then there are none.
    """

    @jit
    def kernel(
        codes: Array,
        table: Array,
        scales: Array,
        zeros: Array,
        minima: Array,
        group: int,
        out: Array,
    ) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            for g in range(scales.shape[1]):
                first = g * group
                last = min(first + group, columns)
                scale = scales[r, g]
                zero = zeros[r, g] if zeros.shape[1] else np.float32(0)
                source = codes[r, first:last]
                target = out[r, first:last]
                if minima.shape[1]:
                    least = minima[r, g]
                    for i in range(last - first):
                        target[i] = _store((table[source[i]] - zero) * scale + least, kind)
                else:
                    for i in range(last - first):
                        target[i] = _store((table[source[i]] - zero) * scale, kind)

    return kernel


@cache
def indexed_values(kind: int) -> Kernel:
    """``(codes, table, scales, zeros, index, out)``: the same, a column's group by ``index``."""

    @jit
    def kernel(
        codes: Array, table: Array, scales: Array, zeros: Array, index: Array, out: Array
    ) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            for c in range(columns):
                g = index[c]
                zero = zeros[r, g] if zeros.shape[1] else np.float32(0)
                out[r, c] = _store((table[codes[r, c]] - zero) * scales[r, g], kind)

    return kernel


@jit
def transpose_bytes(x: Array, out: Array) -> None:
    """``out[c, r] = x[r, c]`` in tiles that stay in the cache."""
    rows, columns = x.shape
    for r in range(0, rows, 64):
        for c in range(0, columns, 64):
            for j in range(c, min(c + 64, columns)):
                for i in range(r, min(r + 64, rows)):
                    out[j, i] = x[i, j]


@jit
def interleaved_nibbles(words: Array, out: Array) -> None:
    """``out[8 w + c, r]``: column c of word w, whose nibbles hold columns 0 2 4 6 1 3 5 7."""
    rows, count = words.shape
    for first in range(0, rows, 64):
        last = min(first + 64, rows)
        for w in range(count):
            for c in range(8):
                shift = np.uint32(4 * ((c >> 1) + 4 * (c & 1)))
                for r in range(first, last):
                    out[8 * w + c, r] = np.uint8((words[r, w] >> shift) & np.uint32(15))
