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
    _bits,
    _ceil_exponent,
    _float,
    _load,
    _load_e4m3,
    _power_of_two,
    _round_to,
    _store_e2m1,
    _store_e4m3,
)

Array = npt.NDArray[Any]

LANES: Final = 64
"""Rows searched at once."""
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_HALF: Final = np.float32(0.5)


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


@jit
def round_e2m1(y: np.float32) -> np.float32:
    """The E2M1 value nearest to ``y`` >= 0: ties go to the lower, saturates at 6."""
    normal = _float(np.uint32(np.uint32(_bits(y) + np.uint32(0x1FFFFF)) & np.uint32(0xFFC00000)))
    tiny = _HALF if y > np.float32(0.25) else _ZERO
    tiny = _ONE if y > np.float32(0.75) else tiny
    return min(normal if y >= _ONE else tiny, np.float32(6))


@jit
def round_e4m3(y: np.float32) -> np.float32:
    """The E4M3 value nearest to ``y`` >= 0: half to even, saturates at 448."""
    x = min(y, np.float32(448))
    binade = max(np.uint32(_bits(x) & np.uint32(0x7F800000)), np.uint32(0x3C800000))
    # 2**20 times the binade: its sum with x has the ulp of E4M3 there.
    large = _float(np.uint32(binade + np.uint32(20 << 23)))
    return (x + large) - large


@cache
def microscaled_search(kind: int, format: int) -> Kernel:
    """``(w, weights, codes, scales) -> int`` over (rows, cols) bits; one code per byte.

    Tries the scale of "rtn" first, then for mxfp4 and mxfp8 the two powers of two below it, for
    nvfp4 the E4M3 scales up to five steps below it and two above; the least weighted error wins.
    The same group of LANES rows is searched at once, a row in each lane.
    """
    group = 16 if format == NVFP4 else 32
    top = np.float32(448 if format == MXFP8 else 6)
    magnitude = 0x7FFFFFFF if kind == F32 else 0x7FFF
    infinity = {0: 0x7F800000, 1: 0x7F80, 2: 0x7C00}[kind]
    tries = 8 if format == NVFP4 else 3
    # Where the lanes of each quantity start: the scale that is tried and its inverse, the best
    # scale, the least error, and eight sums of errors.
    S, INVERSE, BEST, LEAST, T = (LANES * number for number in range(5))
    # Products with an inverse that is a little too small do not tie, and fall on the same side of
    # every edge as quotients: 16-bit weights are further from the edges than that.
    quotient = kind == F32 and format != MXFP8
    shrunk = np.float32(1 if format == MXFP8 else 1 - 2.0**-13)

    def run(w: Array, weights: Array, codes: Array, scales: Array) -> int:
        x, f = np.empty(group * LANES, np.float32), np.empty(12 * LANES, np.float32)
        chosen = np.empty(2 * LANES, np.int32)
        return int(kernel(w, weights, codes, scales, x, f, chosen))

    @jit
    def scaled(x: np.float32, s: np.float32, inverse: np.float32) -> np.float32:
        if quotient:
            return x / s if s > _ZERO else _ZERO
        return x * inverse

    @jit
    def miss(x: np.float32, s: np.float32, inverse: np.float32, weight: np.float32) -> np.float32:
        y = scaled(x, s, inverse)
        value = (round_e4m3(y) if format == MXFP8 else round_e2m1(y)) * s
        e = x - value
        return weight * e * e

    @jit
    def errors(x: Array, v: Array, f: Array) -> None:
        """Eight sums of the errors under S: of every eighth element, by halves."""
        for i in range(8):
            for lane in range(LANES):
                s = f[S + lane]
                inverse = f[INVERSE + lane]
                if group == 16:
                    a = miss(x[i * LANES + lane], s, inverse, v[i])
                    b = miss(x[(i + 8) * LANES + lane], s, inverse, v[i + 8])
                    f[T + i * LANES + lane] = a + b
                else:
                    a = miss(x[i * LANES + lane], s, inverse, v[i])
                    b = miss(x[(i + 16) * LANES + lane], s, inverse, v[i + 16])
                    c = miss(x[(i + 8) * LANES + lane], s, inverse, v[i + 8])
                    d = miss(x[(i + 24) * LANES + lane], s, inverse, v[i + 24])
                    f[T + i * LANES + lane] = (a + b) + (c + d)

    @jit
    def take(f: Array, chosen: Array, k: int) -> None:
        """S and its inverse for try ``k``; a scale that there is not is infinite."""
        for lane in range(LANES):
            first = chosen[lane]
            if format == NVFP4:
                code = np.int32(first - np.int32(k) if k <= 5 else first + np.int32(k - 5))
                s = _load_e4m3(np.uint32(max(code, np.int32(0))))
                there = (code > np.int32(0)) & (code < np.int32(127))
            else:
                code = np.int32(first - np.int32(k))
                s = _power_of_two(np.int32(max(code, np.int32(0)) - np.int32(127)))
                there = code >= np.int32(0)
            there = there | (k == 0)
            f[S + lane] = s if there else np.float32(np.nan)
            f[INVERSE + lane] = _ONE / s * shrunk if s > _ZERO else _ZERO

    @jit
    def keep(f: Array, chosen: Array, k: int) -> None:
        """Make S the best where its error is least."""
        for lane in range(LANES):
            a = (f[T + lane] + f[T + 4 * LANES + lane]) + (
                f[T + 2 * LANES + lane] + f[T + 6 * LANES + lane]
            )
            b = (f[T + LANES + lane] + f[T + 5 * LANES + lane]) + (
                f[T + 3 * LANES + lane] + f[T + 7 * LANES + lane]
            )
            e = a + b
            better = (e < f[LEAST + lane]) | (k == 0)
            f[LEAST + lane] = e if better else f[LEAST + lane]
            f[BEST + lane] = f[S + lane] if better else f[BEST + lane]
            chosen[LANES + lane] = np.int32(k) if better else chosen[LANES + lane]

    @jit
    def kernel(
        w: Array, weights: Array, codes: Array, scales: Array, x: Array, f: Array, chosen: Array
    ) -> int:
        rows, columns = w.shape
        for first in range(0, rows, LANES):
            count = min(LANES, rows - first)
            rejected = rows * columns
            for i in range(group * LANES):  # lanes without a row are searched as well
                x[i] = _ZERO
            for lane in range(LANES):
                chosen[lane] = np.int32(0)
            for g in range(columns // group):
                v = weights[g * group : (g + 1) * group]
                for lane in range(count):
                    bits = w[first + lane, g * group : (g + 1) * group]
                    most = np.uint32(0)
                    for i in range(group):
                        m = np.uint32(bits[i]) & np.uint32(magnitude)
                        most = max(most, m)
                        x[i * LANES + lane] = _load(m, kind)
                    if most >= np.uint32(infinity):
                        rejected = min(rejected, (first + lane) * columns + g * group)
                    wanted = _round_to(_load(most, kind) / top, kind)
                    if format == NVFP4:
                        chosen[lane] = np.int32(_store_e4m3(wanted))
                    else:
                        e = max(_ceil_exponent(wanted), np.int32(-127))
                        chosen[lane] = np.int32(e + np.int32(127))
                for k in range(tries):
                    take(f, chosen, k)
                    errors(x, v, f)
                    keep(f, chosen, k)
                for lane in range(count):
                    k = chosen[LANES + lane]
                    step = np.int32(k - np.int32(5) if k > np.int32(5) else -k)
                    scales[first + lane, g] = np.uint8(chosen[lane] + step)
                    s = f[BEST + lane]
                    inverse = _ONE / s * shrunk if s > _ZERO else _ZERO
                    bits = w[first + lane, g * group : (g + 1) * group]
                    out = codes[first + lane, g * group : (g + 1) * group]
                    for i in range(group):
                        y = scaled(_load(np.uint32(bits[i]), kind), s, inverse)
                        out[i] = np.uint8(_store_e4m3(y) if format == MXFP8 else _store_e2m1(y))
            if rejected < rows * columns:
                return int(rejected)
        return -1

    return run
