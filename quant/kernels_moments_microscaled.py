"""Compiled descent on the codes of each microscaled group: see ``quant.kernels_moments``.

Codes alone change; scales stay what a search has found (``quant.kernels_search``).
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import (
    MXFP8,
    NVFP4,
    _bits,
    _float,
    _load,
    _load_e2m1,
    _load_e4m3,
    _power_of_two,
    _store_e2m1,
    _store_e4m3,
)
from quant.kernels_moments import CHANGES
from quant.kernels_search import round_e2m1, round_e4m3

Array = npt.NDArray[Any]

BESIDE: Final = 16
"""Rows whose codes are changed in turns."""
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_SIGN: Final = np.uint32(0x80000000)
_U1, _U2, _U3, _U4, _U5, _U6, _U7 = (np.uint64(k) for k in range(1, 8))


@cache
def microscaled_descent(kind: int, format: int) -> Kernel:
    """``(w, moments, codes, scales)`` over (rows, cols) bits; improves the codes alone.

    BESIDE rows take their changes in turns: one change waits for the one before it.
    """
    group = 16 if format == NVFP4 else 32
    fp8 = format == MXFP8
    size = BESIDE * group
    # Where these start for each row, in units of the scale: what codes stand for, what is best for
    # each alone, and M E.
    V, BEST, R = (size * number for number in range(3))
    # Beside each row of M lie half its diagonal, and the inverse of the diagonal.
    HALF, INVERSE, STRIDE = (group * number for number in range(1, 4))
    M1, M2, M3, M4 = (np.uint64(STRIDE * k) for k in range(1, 5))

    @jit
    def store(x: np.float32) -> np.uint32:
        return _store_e4m3(x) if fp8 else _store_e2m1(x)

    @jit
    def load(code: np.uint32) -> np.float32:
        return _load_e4m3(code) if fp8 else _load_e2m1(code)

    @jit
    def nearest(z: np.float32) -> np.float32:
        y = abs(z)
        value = round_e4m3(y) if fp8 else round_e2m1(y)
        return _float(np.uint32(_bits(value) | (_bits(z) & _SIGN)))

    @jit
    def change(m: Array, f: Array, row: int, j: np.int32, d: np.float32) -> np.int32:
        """Change V of element ``j`` by ``d``; gain and place of the next: see affine_descent.

        A change by d takes 2 d r - d d M_ii from the error, which pays where the value that is best
        for this code alone is nearer to the new value than to the old.
        """
        best = np.int32(0)
        at = np.uint64(row * group)
        of_m = np.uint64(j) * np.uint64(STRIDE)
        for i in range(group):
            place = at + np.uint64(i)
            beside = of_m + np.uint64(i)
            r = f[place + np.uint64(R)] - d * m[beside]
            v = f[place + np.uint64(V)] + (d if np.int32(i) == j else _ZERO)
            value = nearest(v + r * m[beside + np.uint64(INVERSE)])
            move = value - v
            gain = (r - move * m[beside + np.uint64(HALF)]) * move
            gain = gain if gain > _ZERO else _ZERO  # NaN, whose sign differs by processor, too
            f[place + np.uint64(R)] = r
            f[place + np.uint64(V)] = v
            f[place + np.uint64(BEST)] = value
            key = np.int32(np.int32(_bits(gain)) & np.int32(~(group - 1)))
            best = max(best, np.int32(key | np.int32(i)))
        return best

    @jit
    def descend(m: Array, f: Array, todo: Array, count: int) -> None:
        """Change the code whose change gains most, until none gains anything, of ``todo``'s rows.

        ``todo`` holds the rows, then the element to change of each.
        """
        for k in range(count):
            todo[BESIDE + k] = np.int32(0)
        d = _ZERO
        for _ in range(CHANGES * group):
            left = 0
            for k in range(count):
                row = int(todo[k])
                j = todo[BESIDE + k]
                place = np.uint64(row * group + j)
                d = f[np.uint64(BEST) + place] - f[np.uint64(V) + place]
                best = change(m, f, row, j, d)
                todo[left] = np.int32(row)
                todo[BESIDE + left] = np.int32(best & np.int32(group - 1))
                left += 1 if best >= np.int32(group) else 0
            count = left
            if count == 0:
                break

    @jit
    def multiply(m: Array, f: Array, row: int) -> None:
        """R from the errors of a row, which are in place of BEST."""
        for i in range(group):
            f[np.uint64(R + row * group + i)] = _ZERO
        for half in range(group // 16):
            at = np.uint64(BEST + row * group + 16 * half)
            e0, e1, e2, e3 = f[at], f[at + _U1], f[at + _U2], f[at + _U3]
            e4, e5, e6, e7 = f[at + _U4], f[at + _U5], f[at + _U6], f[at + _U7]
            at = np.uint64(BEST + row * group + 16 * half + 8)
            e8, e9, ea, eb = f[at], f[at + _U1], f[at + _U2], f[at + _U3]
            ec, ed, ee, ef = f[at + _U4], f[at + _U5], f[at + _U6], f[at + _U7]
            own = np.uint64(16 * half * STRIDE)
            out = np.uint64(R + row * group)
            for i in range(group):
                at = own + np.uint64(i)
                r = f[out + np.uint64(i)]
                r += (e0 * m[at] + e1 * m[at + M1]) + (e2 * m[at + M2] + e3 * m[at + M3])
                at += M4
                r += (e4 * m[at] + e5 * m[at + M1]) + (e6 * m[at + M2] + e7 * m[at + M3])
                at += M4
                r += (e8 * m[at] + e9 * m[at + M1]) + (ea * m[at + M2] + eb * m[at + M3])
                at += M4
                r += (ec * m[at] + ed * m[at + M1]) + (ee * m[at + M2] + ef * m[at + M3])
                f[out + np.uint64(i)] = r

    def run(w: Array, moments: Array, codes: Array, scales: Array) -> None:
        f, m = np.empty(3 * size, np.float32), np.empty(group * STRIDE, np.float32)
        line = np.empty(size, np.uint8)
        todo = np.empty(2 * BESIDE, np.int32)
        kernel(w, moments, codes, scales, m, f, todo, line)

    @jit
    def kernel(
        w: Array,
        moments: Array,
        codes: Array,
        scales: Array,
        m: Array,
        f: Array,
        todo: Array,
        line: Array,
    ) -> None:
        rows, columns = w.shape
        for i in range(size):
            f[V + i] = _ZERO
        for g in range(columns // group):
            for j in range(group):
                for i in range(group):
                    m[j * STRIDE + i] = moments[g, j, i]
                    m[j * STRIDE + HALF + i] = moments[g, i, i] * np.float32(0.5)
                    m[j * STRIDE + INVERSE + i] = _ONE / moments[g, i, i]
            for first in range(0, rows, BESIDE):
                count = 0
                beside = min(BESIDE, rows - first)
                for row in range(beside):
                    code = np.uint32(scales[first + row, g])
                    if format == NVFP4:
                        s = _load_e4m3(code)
                    else:
                        s = _power_of_two(np.int32(code) - np.int32(127))
                    own = codes[first + row, g * group : (g + 1) * group]
                    bits = w[first + row, g * group : (g + 1) * group]
                    at = row * group
                    for i in range(group):
                        v = load(np.uint32(own[i])) + _ZERO  # no negative zero
                        f[V + at + i] = v
                        f[BEST + at + i] = _load(np.uint32(bits[i]), kind) / s - v
                    multiply(m, f, row)
                    todo[count] = np.int32(row)
                    count += 1 if s > _ZERO else 0
                for i in range(size):
                    f[BEST + i] = f[V + i]
                descend(m, f, todo, count)
                for i in range(size):
                    line[i] = np.uint8(store(f[V + i]))
                words = line.view(np.uint64)
                for row in range(beside):
                    own = codes[first + row].view(np.uint64)
                    for i in range(group // 8):
                        own[g * (group // 8) + i] = words[row * (group // 8) + i]

    return run
