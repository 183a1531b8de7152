"""Compiled searches for the scale and bias of each group.

They minimise ``sum v (w - value)**2`` over a group, ``v`` the weight of each input column and
``value`` what the stored scale, bias and code stand for. Sums run in a fixed order, by halves, so
the same input gives the same bytes on every machine. Reject as the kernels of ``quant.kernels`` do.
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
    _load,
    _load_e2m1,
    _load_e4m3,
    _power_of_two,
    _round_to,
    _store,
    _store_e2m1,
    _store_e4m3,
)

Array = npt.NDArray[Any]

_ZERO: Final = np.float32(0)
_ULP_ONE: Final = np.float32(2.0**23)
_LEAST_SCALE: Final = np.float32(1e-7)
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
def affine_search(kind: int, group: int) -> Kernel:
    """``(w, weights, levels, clips, neighbours, codes, scales, biases) -> int`` over bits.

    ``weights`` (cols,) float32 weigh the columns. Starts from the scale and bias of "rtn" and
    from grids that leave out ``clips`` steps of the group's range; each is refined by the least
    squares fit to its codes (make_qkx2_quants of ggml) and rounded to ``kind`` before its error
    counts, and the best is kept: never worse than "rtn". ``neighbours`` tries the two stored scales
    next to the best as well.
    """
    fold = fold_sum(group)
    magnitude = 0x7FFFFFFF if kind == F32 else 0x7FFF
    infinity = {0: 0x7F800000, 1: 0x7F80, 2: 0x7C00}[kind]

    @jit
    def error(
        x: Array, v: Array, s: np.float32, b: np.float32, n: np.float32, t: Array
    ) -> np.float32:
        for i in range(group):
            q = min(max((x[i] - b) / s, _ZERO), n)
            q = (q + _ULP_ONE) - _ULP_ONE
            e = x[i] - (s * q + b)
            t[i] = v[i] * e * e
        return np.float32(fold(t, 0))

    @jit
    def fit(
        x: Array, v: Array, s: np.float32, b: np.float32, n: np.float32, t: Array, out: Array
    ) -> None:
        """Least squares (s, b) for the codes of ``s, b``, and the weighted mean code."""
        for i in range(group):
            y = (x[i] - b) / s
            q = min(max(y, _ZERO), n)
            q = (q + _ULP_ONE) - _ULP_ONE
            e = y - q
            vq = v[i] * q
            t[i] = v[i]
            t[group + i] = vq
            t[2 * group + i] = vq * q
            t[3 * group + i] = v[i] * e
            t[4 * group + i] = vq * e
        sv = fold(t, 0)
        sq = fold(t, group)
        sqq = fold(t, 2 * group)
        se = fold(t, 3 * group)
        sqe = fold(t, 4 * group)
        mean = sq / sv
        spread = sqq - sq * mean
        slope = (sqe - se * mean) / spread
        slope = slope if spread > np.float32(1e-6) * sqq else _ZERO
        out[0] = s + s * slope
        out[1] = b + s * (se / sv - slope * mean)
        out[2] = mean

    def run(
        w: Array,
        weights: Array,
        levels: np.float32,
        clips: Array,
        neighbours: bool,
        codes: Array,
        scales: Array,
        biases: Array,
    ) -> int:
        x, t = np.empty(w.shape[1], np.float32), np.empty(5 * group, np.float32)
        found = np.empty(3, np.float32)
        result = kernel(w, weights, levels, clips, neighbours, codes, scales, biases, x, t, found)
        return int(result)

    @jit
    def kernel(
        w: Array,
        weights: Array,
        levels: np.float32,
        clips: Array,
        neighbours: bool,
        codes: Array,
        scales: Array,
        biases: Array,
        x: Array,
        t: Array,
        found: Array,
    ) -> int:
        rows, columns = w.shape
        for r in range(rows):
            row = w[r]
            for i in range(columns):
                x[i] = _load(np.uint32(row[i]), kind)
            for g in range(columns // group):
                xs = x[g * group : (g + 1) * group]
                vs = weights[g * group : (g + 1) * group]
                most = np.uint32(0)
                for i in range(group):
                    most = max(most, np.uint32(row[g * group + i]) & np.uint32(magnitude))
                if most >= np.uint32(infinity):
                    return int(r * columns + g * group)
                for i in range(group):
                    t[i] = xs[i]
                    t[group + i] = -xs[i]
                size = group // 2
                while size > 0:
                    for i in range(size):
                        t[i] = max(t[i], t[i + size])
                        t[group + i] = max(t[group + i], t[group + i + size])
                    size //= 2
                high = t[0]
                low = -t[group]
                s = max(np.float32(high - low) / levels, _LEAST_SCALE)
                negative = abs(low) > abs(high)
                s = s if negative else -s
                edge = low if negative else high
                steps = np.float32(np.rint(edge / s))
                s = s if steps == _ZERO else edge / steps
                edge = _ZERO if steps == _ZERO else edge
                s = _round_to(s, kind)
                if not abs(s) < _INFINITE:
                    return int(r * columns + g * group)
                best_s = s
                best_b = _round_to(edge, kind)
                least = error(xs, vs, best_s, best_b, levels, t)
                clipped = clips.shape[0]
                fresh = True
                tries = clipped + (3 if neighbours else 1)
                for k in range(tries if least > _ZERO else 0):
                    if k < clipped:
                        s = np.float32(high - low) / (levels + clips[k])
                        s = s if negative else -s
                        b = (low + high) * np.float32(0.5) - s * (levels * np.float32(0.5))
                    else:
                        s, b = best_s, best_b
                    if fresh or k <= clipped:
                        fit(xs, vs, s, b, levels, t, found)
                    s = found[0]
                    if k > clipped:  # the neighbours of the best stored scale
                        step = np.uint32(1 if k > clipped + 1 else 0xFFFFFFFF)
                        s = _load(np.uint32(_store(best_s, kind) + step), kind)
                    s = _round_to(s, kind)
                    b = _round_to(found[1] + (found[0] - s) * found[2], kind)
                    e = error(xs, vs, s, b, levels, t)
                    fresh = bool(e < least and abs(s) >= _LEAST_SCALE)
                    if fresh:
                        least = e
                        best_s = s
                        best_b = b
                scales[r, g] = _store(best_s, kind)
                biases[r, g] = _store(best_b, kind)
                out = codes[r, g * group : (g + 1) * group]
                for i in range(group):
                    q = min(max((xs[i] - best_b) / best_s, _ZERO), levels)
                    out[i] = np.uint8(_bits(q + _ULP_ONE) & np.uint32(0xFF))
        return -1

    return run


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
