"""Compiled search for the scale of each microscaled group.

It minimises ``sum v (w - value)**2`` over a group, ``v`` the weight of each input column and
``value`` what the stored scale and code stand for. Sums run in a fixed order, by halves, so the
same input gives the same bytes on every machine. Rejects as the kernels of ``quant.kernels`` do.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import (
    F32,
    MXFP8,
    NVFP4,
    _ceil_exponent,
    _load,
    _load_e2m1,
    _load_e4m3,
    _power_of_two,
    _round_to,
    _store_e2m1,
    _store_e4m3,
)

Array = npt.NDArray[Any]

_ZERO: Final = np.float32(0)
_INFINITE: Final = np.float32(np.inf)


@cache
def fold_sum(size: int) -> Kernel:
    """``(t, start) -> float32``: sum of ``size`` values of ``t``, by halves; spoils them.

    ``size`` is 16, 32, 64 or 128.
    """
    assert size in (16, 32, 64, 128), size
    halves = tuple(size >> step for step in range(1, size.bit_length() - 3))
    h1, h2, h3, h4 = (*halves, 0, 0, 0)[:4]

    @jit
    def kernel(t: Array, start: int) -> np.float32:
        x = t[start : start + size]
        for i in range(h1):
            x[i] += x[i + h1]
        for i in range(h2):
            x[i] += x[i + h2]
        for i in range(h3):
            x[i] += x[i + h3]
        for i in range(h4):
            x[i] += x[i + h4]
        a = (x[0] + x[4]) + (x[2] + x[6])
        b = (x[1] + x[5]) + (x[3] + x[7])
        return np.float32(a + b)

    return kernel


@cache
def microscaled_search(kind: int, format: int) -> Kernel:
    """``(w, weights, codes, scales) -> int`` over (rows, cols) bits; one code per byte.

    Tries the scale of "rtn" first, then for mxfp4 and mxfp8 the two powers of two below it, for
    nvfp4 the E4M3 scales up to five steps below it and two above; the least weighted error wins.
    """
    group = 16 if format == NVFP4 else 32
    top = np.float32(448 if format == MXFP8 else 6)
    fold = fold_sum(group)
    magnitude = 0x7FFFFFFF if kind == F32 else 0x7FFF
    infinity = {0: 0x7F800000, 1: 0x7F80, 2: 0x7C00}[kind]
    tries = 8 if format == NVFP4 else 3

    def run(w: Array, weights: Array, codes: Array, scales: Array) -> int:
        x, t = np.empty(group, np.float32), np.empty(group, np.float32)
        return int(kernel(w, weights, codes, scales, x, t))

    @jit
    def kernel(w: Array, weights: Array, codes: Array, scales: Array, x: Array, t: Array) -> int:
        rows, columns = w.shape
        for r in range(rows):
            for g in range(columns // group):
                start = g * group
                most = np.uint32(0)
                for i in range(group):
                    most = max(most, np.uint32(w[r, start + i]) & np.uint32(magnitude))
                    x[i] = _load(np.uint32(w[r, start + i]), kind)
                if most >= np.uint32(infinity):
                    return int(r * columns + start)
                wanted = _round_to(_load(most, kind) / top, kind)
                if format == NVFP4:
                    first = np.int32(_store_e4m3(wanted))
                else:
                    first = np.int32(max(_ceil_exponent(wanted), np.int32(-127)) + np.int32(127))
                best = first
                best_scale = _ZERO
                least = _INFINITE
                for k in range(tries):
                    code = first - np.int32(k)
                    if format == NVFP4 and k > 5:
                        code = first + np.int32(k - 5)
                    if code < 0 or (format == NVFP4 and (code > 126 or (code == 0 and k > 0))):
                        continue
                    if format == NVFP4:
                        s = _load_e4m3(np.uint32(code))
                    else:
                        s = _power_of_two(np.int32(code - np.int32(127)))
                    for i in range(group):
                        y = x[i] / s if s > _ZERO else _ZERO
                        if format == MXFP8:
                            value = _load_e4m3(_store_e4m3(y)) * s
                        else:
                            value = _load_e2m1(_store_e2m1(y)) * s
                        e = x[i] - value
                        t[i] = weights[start + i] * e * e
                    e = fold(t, 0)
                    if e < least or k == 0:
                        least = e
                        best = code
                        best_scale = s
                scales[r, g] = np.uint8(best)
                for i in range(group):
                    y = x[i] / best_scale if best_scale > _ZERO else _ZERO
                    codes[r, start + i] = np.uint8(
                        _store_e4m3(y) if format == MXFP8 else _store_e2m1(y)
                    )
        return -1

    return run
