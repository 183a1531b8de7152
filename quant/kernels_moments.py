"""Compiled descent on codes, scale and bias of each group.

It minimises ``e^T M e`` over the errors ``e`` of a group, ``M`` (group, group) the second moments
of the inputs that the group multiplies: what the group's errors add to the output, squared. Starts
from codes that a search has found (``quant.kernels_search``). Sums run in a fixed order, so the
same input gives the same bytes on every machine.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import (
    MXFP8,
    NVFP4,
    _load,
    _load_e2m1,
    _load_e4m3,
    _power_of_two,
    _round_to,
    _store,
    _store_e2m1,
    _store_e4m3,
)
from quant.kernels_search import fold_sum

Array = npt.NDArray[Any]

PASSES: Final = 2
"""Most visits of each code in one descent."""
FITS: Final = 5
"""Most times that scale and bias are fitted to the codes, and the codes to them again."""
_ZERO: Final = np.float32(0)
_ONE_AND_HALF_ULP: Final = np.float32(1.5 * 2.0**23)
_LEAST_SCALE: Final = np.float32(1e-7)


@cache
def affine_descent(kind: int, group: int) -> Kernel:
    """``(w, moments, levels, codes, scales, biases)`` over (rows, cols) bits.

    ``moments`` is (cols / group, group, group) float32, symmetric with a positive diagonal. Codes,
    scales and biases are read and improved; no group's error grows.
    """

    fold = fold_sum(group)

    @jit
    def first_moved(r: Array, share: Array, q: Array, n: np.float32, start: np.int32) -> int:
        """The first code from ``start`` that another one betters, or ``group``."""
        first = np.int32(group)
        for i in range(group):
            step = (r[i] * share[i] + _ONE_AND_HALF_ULP) - _ONE_AND_HALF_ULP
            moved = min(max(q[i] + step, _ZERO), n) != q[i]
            at = np.int32(i)
            first = min(first, at if moved and at >= start else np.int32(group))
        return int(first)

    @jit
    def descend(
        m: Array, diagonal: Array, s: np.float32, n: np.float32, q: Array, r: Array, share: Array
    ) -> None:
        """Change one code at a time to the best for all others, until none changes.

        Few change: looking at all of them for the next one is faster than visiting each.
        """
        for i in range(group):
            share[i] = np.float32(1) / (s * diagonal[i])
        for _ in range(PASSES):
            i = first_moved(r, share, q, n, np.int32(0))
            if i == group:
                break
            while i < group:
                step = (r[i] * share[i] + _ONE_AND_HALF_ULP) - _ONE_AND_HALF_ULP
                d = min(max(q[i] + step, _ZERO), n) - q[i]
                q[i] += d
                ds = s * d
                row = m[i]
                for j in range(group):
                    r[j] -= ds * row[j]
                i = first_moved(r, share, q, n, np.int32(i + 1))

    @jit
    def multiply(m: Array, v: Array, out: Array) -> None:
        """``m @ v`` by columns, four at a time."""
        for i in range(group):
            out[i] = _ZERO
        for j in range(0, group, 4):
            for i in range(group):
                two = v[j] * m[j, i] + v[j + 1] * m[j + 1, i]
                out[i] += two + (v[j + 2] * m[j + 2, i] + v[j + 3] * m[j + 3, i])

    @jit
    def error(x: Array, s: np.float32, b: np.float32, q: Array, r: Array, t: Array) -> np.float32:
        for i in range(group):
            t[i] = (x[i] - (s * q[i] + b)) * r[i]
        return np.float32(fold(t, 0))

    def run(
        w: Array, moments: Array, levels: np.float32, codes: Array, scales: Array, biases: Array
    ) -> None:
        scratch, t = np.empty((8, group), np.float32), np.empty(4 * group, np.float32)
        kernel(w, moments, levels, codes, scales, biases, scratch, t)

    @jit
    def kernel(
        w: Array,
        moments: Array,
        levels: np.float32,
        codes: Array,
        scales: Array,
        biases: Array,
        scratch: Array,
        t: Array,
    ) -> None:
        rows, columns = w.shape
        x, e, q, best = scratch[0], scratch[1], scratch[2], scratch[3]
        r, mq, m1, diagonal = scratch[4], scratch[5], scratch[6], scratch[7]
        for g in range(columns // group):
            m = moments[g]
            for i in range(group):
                e[i] = np.float32(1)
                diagonal[i] = m[i, i]
            multiply(m, e, m1)
            for i in range(group):
                t[i] = m1[i]
            total = fold(t, 0)
            for row in range(rows):
                s = _load(np.uint32(scales[row, g]), kind)
                b = _load(np.uint32(biases[row, g]), kind)
                own = codes[row, g * group : (g + 1) * group]
                bits = w[row, g * group : (g + 1) * group]
                for i in range(group):
                    x[i] = _load(np.uint32(bits[i]), kind)
                    q[i] = np.float32(own[i])
                    e[i] = x[i] - (s * q[i] + b)
                multiply(m, e, r)
                least = error(x, s, b, q, r, t)
                if not least > _ZERO:
                    continue
                for i in range(group):
                    best[i] = q[i]
                best_s = s
                best_b = b
                descend(m, diagonal, s, levels, q, r, e)
                found = error(x, s, b, q, r, t)
                if found < least:
                    least = found
                    for i in range(group):
                        best[i] = q[i]
                for _ in range(FITS):
                    multiply(m, q, mq)
                    for i in range(group):
                        t[i] = q[i] * mq[i]
                        t[group + i] = mq[i]
                        t[2 * group + i] = q[i] * r[i]
                        t[3 * group + i] = r[i]
                    qq = fold(t, 0)
                    q1 = fold(t, group)
                    towards_s = fold(t, 2 * group)
                    towards_b = fold(t, 3 * group)
                    spread = qq * total - q1 * q1
                    if not spread > np.float32(1e-6) * qq * total:
                        break
                    next_s = _round_to(s + (towards_s * total - towards_b * q1) / spread, kind)
                    next_b = _round_to(b + (towards_b - (next_s - s) * q1) / total, kind)
                    if abs(next_s) < _LEAST_SCALE or (next_s == s and next_b == b):
                        break
                    for i in range(group):
                        r[i] -= (next_s - s) * mq[i] + (next_b - b) * m1[i]
                    s = next_s
                    b = next_b
                    descend(m, diagonal, s, levels, q, r, e)
                    found = error(x, s, b, q, r, t)
                    if not found < least:
                        break
                    least = found
                    best_s = s
                    best_b = b
                    for i in range(group):
                        best[i] = q[i]
                scales[row, g] = _store(best_s, kind)
                biases[row, g] = _store(best_b, kind)
                for i in range(group):
                    own[i] = np.uint8(best[i])

    return run


@cache
def microscaled_descent(kind: int, format: int) -> Kernel:
    """``(w, moments, codes, scales)`` over (rows, cols) bits; improves the codes alone."""
    group = 16 if format == NVFP4 else 32
    fp8 = format == MXFP8

    @jit
    def value(code: np.uint32) -> np.float32:
        return _load_e4m3(code) if fp8 else _load_e2m1(code)

    def run(w: Array, moments: Array, codes: Array, scales: Array) -> None:
        kernel(w, moments, codes, scales, np.empty(group, np.float32), np.empty(group, np.float32))

    @jit
    def kernel(w: Array, moments: Array, codes: Array, scales: Array, v: Array, r: Array) -> None:
        rows, columns = w.shape
        for g in range(columns // group):
            m = moments[g]
            for row in range(rows):
                code = np.uint32(scales[row, g])
                if format == NVFP4:
                    s = _load_e4m3(code)
                else:
                    s = _power_of_two(np.int32(code) - np.int32(127))
                if not s > _ZERO:
                    continue
                own = codes[row, g * group : (g + 1) * group]
                bits = w[row, g * group : (g + 1) * group]
                for i in range(group):
                    v[i] = value(np.uint32(own[i]))
                    r[i] = _ZERO
                for j in range(group):
                    e = _load(np.uint32(bits[j]), kind) / s - v[j]
                    for i in range(group):
                        r[i] += e * m[j, i]
                for _ in range(PASSES):
                    changed = False
                    for i in range(group):
                        y = v[i] + r[i] / m[i, i]
                        c = _store_e4m3(y) if fp8 else _store_e2m1(y)
                        d = value(c) - v[i]
                        # A change must pay: y is nearer to the new value than to the old.
                        if d != _ZERO and abs(y - value(c)) < abs(y - v[i]):
                            changed = True
                            v[i] = value(c)
                            own[i] = np.uint8(c)
                            for j in range(group):
                                r[j] -= d * m[i, j]
                    if not changed:
                        break

    return run
