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
from quant.kernels import _bits, _float, _load, _round_to, _store
from quant.kernels_search import fold_sum

Array = npt.NDArray[Any]

CHANGES: Final = 4
"""Most changes of codes in one descent, by the size of the group; a tenth of that is usual."""
FITS: Final = 2
"""Most times that scale and bias are fitted to the codes, and the codes to them again."""
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_U1, _U2, _U3 = np.uint64(1), np.uint64(2), np.uint64(3)
_ULP_ONE: Final = np.float32(2.0**23)
_INFINITE: Final = np.float32(np.inf)
_SIGN: Final = np.uint32(0x80000000)
_LEAST_SCALE: Final = np.float32(1e-7)


@cache
def affine_descent(kind: int, group: int) -> Kernel:
    """``(w, moments, levels, codes, scales, biases)`` over (rows, cols) bits.

    ``moments`` is (cols / group, group, group) float32, symmetric with a positive diagonal. Codes,
    scales and biases are read and improved; no group's error grows.
    """
    # Where each vector of a row starts. Weights and errors are in units of the scale: Y is
    # (X - bias) / scale, and E what codes Q miss of it; R is M E and MY is M Y. UP and DOWN are the
    # bounds that R passes where a change pays; they take the place of E.
    X, Y, Q, R, MY, UP, DOWN, SIZE = (group * number for number in range(8))
    E = UP
    # For all rows: half the diagonal of M, and M 1.
    HALF, M1 = 0, group
    sign_shift = 32 - group.bit_length()
    beside = 1024 // group
    strips = group // 16
    fold = fold_sum(16)

    @jit
    def multiply(m: Array, f: Array, row: int) -> None:
        """R and MY from E and Y of a row, four columns at a time."""
        at = np.uint64(row * SIZE)
        for i in range(group):
            f[at + np.uint64(R + i)] = _ZERO
            f[at + np.uint64(MY + i)] = _ZERO
        for j in range(0, group, 4):
            k = at + np.uint64(E + j)
            e0, e1, e2, e3 = f[k], f[k + _U1], f[k + _U2], f[k + _U3]
            k = at + np.uint64(Y + j)
            y0, y1, y2, y3 = f[k], f[k + _U1], f[k + _U2], f[k + _U3]
            of_m = np.uint64(j * group)
            for i in range(group):
                k = of_m + np.uint64(i)
                m0, m1 = m[k], m[k + np.uint64(group)]
                m2, m3 = m[k + np.uint64(2 * group)], m[k + np.uint64(3 * group)]
                k = at + np.uint64(i)
                f[k + np.uint64(R)] += (e0 * m0 + e1 * m1) + (e2 * m2 + e3 * m3)
                f[k + np.uint64(MY)] += (y0 * m0 + y1 * m1) + (y2 * m2 + y3 * m3)

    @jit
    def bound(f: Array, h: Array, place: np.uint64, i: int, n: np.float32) -> None:
        """What r must exceed for a change up, and stay below for one down: half of M_ii, or all."""
        q = f[place + np.uint64(Q)]
        half = _bits(h[np.uint64(i)])
        up = half if q < n else np.uint32(0x7F800000)
        down = half if q > _ZERO else np.uint32(0x7F800000)
        f[place + np.uint64(UP)] = _float(up)
        f[place + np.uint64(DOWN)] = _float(np.uint32(down | _SIGN))

    @jit
    def descend(
        m: Array, h: Array, f: Array, todo: Array, count: int, steps: Array, n: np.float32
    ) -> None:
        """Change the code by one whose change gains most, until none gains anything.

        A change by d = 1 or -1 takes 2 d r - M_ii from the error. Its gain, as the bits of a float,
        carries sign and index in place of its last digits: the greatest of all is one reduction.

        The first ``count`` of ``todo`` are the rows; what to change in each is kept after them, and
        by what in ``steps``. A code changes long before its row's next turn: what was just written
        a number at a time is slow to read as a vector.
        """
        digits = np.int32(~(2 * group - 1))
        for k in range(count):
            todo[beside + k] = todo[k]
            todo[2 * beside + k] = np.int32(0)
            steps[k] = _ZERO
        for turn in range(1, CHANGES * group + 1):
            left = 0
            for k in range(count):
                row = todo[np.uint64(beside + k)]
                d = steps[np.uint64(k)]
                at = np.uint64(row) * np.uint64(SIZE)
                of_m = np.uint64(todo[np.uint64(2 * beside + k)]) * np.uint64(group)
                best = np.int32(0)
                for i in range(group):
                    place = at + np.uint64(i)
                    r = f[place + np.uint64(R)] - d * m[of_m + np.uint64(i)]
                    f[place + np.uint64(R)] = r
                    up = np.int32(_bits(r - f[place + np.uint64(UP)]))
                    down = np.int32(_bits(f[place + np.uint64(DOWN)] - r))
                    up = np.int32(np.int32(up & digits) | np.int32(i))
                    down = np.int32(np.int32(down & digits) | np.int32(i | group))
                    best = max(best, max(up, down))
                j = np.int32(best & np.int32(group - 1))
                one = np.uint32(np.uint32(best & np.int32(group)) << np.uint32(sign_shift))
                more = best >= np.int32(2 * group) and turn < CHANGES * group
                d = _float(np.uint32(one | (np.uint32(0x3F800000) if more else np.uint32(0))))
                place = at + np.uint64(j)
                f[place + np.uint64(Q)] += d
                bound(f, h, place, int(j), n)
                todo[np.uint64(beside + left)] = row
                todo[np.uint64(2 * beside + left)] = j
                steps[np.uint64(left)] = d
                left += 1 if more else 0
            count = left
            if count == 0:
                break

    @jit
    def add(f: Array, t: Array, row: int) -> None:
        """Sums of a fit: of the error, of M Q, Q M Q, Q R and R; strips of 16, then by halves."""
        at = np.uint64(row * SIZE)
        for i in range(16):
            e = _ZERO
            q1 = _ZERO
            qq = _ZERO
            qr = _ZERO
            r1 = _ZERO
            for strip in range(strips):
                place = at + np.uint64(i + 16 * strip)
                q = f[place + np.uint64(Q)]
                r = f[place + np.uint64(R)]
                mq = f[place + np.uint64(MY)] - r
                e += (f[place + np.uint64(Y)] - q) * r
                q1 += mq
                qq += q * mq
                qr += q * r
                r1 += r
            t[i] = e
            t[16 + i] = q1
            t[32 + i] = qq
            t[48 + i] = qr
            t[64 + i] = r1
        for k in range(5):
            for i in range(8):
                t[16 * k + i] += t[16 * k + i + 8]
        for k in range(5):
            a = (t[16 * k] + t[16 * k + 4]) + (t[16 * k + 2] + t[16 * k + 6])
            b = (t[16 * k + 1] + t[16 * k + 5]) + (t[16 * k + 3] + t[16 * k + 7])
            t[k] = a + b

    @jit
    def sum_rows(m: Array, h: Array, t: Array) -> np.float32:
        """M1 and half the diagonal; returns the sum of all of M."""
        for i in range(group):
            h[M1 + i] = _ZERO
            h[HALF + i] = m[i * group + i] * np.float32(0.5)
        for j in range(group):
            for i in range(group):
                h[M1 + i] += m[j * group + i]
        for i in range(16):
            total = _ZERO
            for strip in range(strips):
                total += h[M1 + i + 16 * strip]
            t[i] = total
        return np.float32(fold(t, 0))

    def run(
        w: Array, moments: Array, levels: np.float32, codes: Array, scales: Array, biases: Array
    ) -> None:
        f, h = np.zeros(beside * SIZE, np.float32), np.empty(2 * group, np.float32)
        t, grid = np.empty(5 * 16, np.float32), np.empty(3 * beside, np.float32)
        todo, steps = np.empty(3 * beside, np.int32), np.empty(beside, np.float32)
        given = (w, moments.reshape(-1), levels)
        kernel(*given, codes, scales, biases, f, h, t, grid, todo, steps)

    @jit
    def kernel(
        w: Array,
        moments: Array,
        levels: np.float32,
        codes: Array,
        scales: Array,
        biases: Array,
        f: Array,
        h: Array,
        t: Array,
        grid: Array,
        todo: Array,
        steps: Array,
    ) -> None:
        rows, columns = w.shape
        for g in range(columns // group):
            m = moments[g * group * group : (g + 1) * group * group]
            total = sum_rows(m, h, t)
            for first in range(0, rows, beside):
                count = min(beside, rows - first)
                for row in range(count):
                    s = _load(np.uint32(scales[first + row, g]), kind)
                    b = _load(np.uint32(biases[first + row, g]), kind)
                    inverse = _ONE / s
                    own = codes[first + row, g * group : (g + 1) * group]
                    bits = w[first + row, g * group : (g + 1) * group]
                    v = f[row * SIZE : (row + 1) * SIZE]
                    for i in range(group):
                        x = _load(np.uint32(bits[i]), kind)
                        q = np.float32(own[i])
                        y = (x - b) * inverse
                        v[X + i] = x
                        v[Y + i] = y
                        v[Q + i] = q
                        v[E + i] = y - q
                    todo[row] = np.int32(row)
                    grid[row] = s
                    grid[beside + row] = b
                    grid[2 * beside + row] = np.float32(np.inf)
                for row in range(count):
                    multiply(m, f, row)
                    for i in range(group):
                        bound(f, h, np.uint64(row * SIZE + i), i, levels)
                for fits in range(FITS + 1):
                    descend(m, h, f, todo, count, steps, levels)
                    left = 0
                    for k in range(count):
                        row = int(todo[k])
                        s = grid[row]
                        b = grid[beside + row]
                        add(f, t, row)
                        found = t[0] * s * s
                        if not found < grid[2 * beside + row]:
                            continue
                        grid[2 * beside + row] = found
                        scales[first + row, g] = _store(s, kind)
                        biases[first + row, g] = _store(b, kind)
                        own = codes[first + row, g * group : (g + 1) * group]
                        v = f[row * SIZE : (row + 1) * SIZE]
                        for i in range(group):
                            own[i] = np.uint8(_bits(v[Q + i] + _ULP_ONE) & np.uint32(0xFF))
                        if fits == FITS:
                            continue
                        q1, qq, qr, r1 = t[1], t[2], t[3], t[4]
                        spread = qq * total - q1 * q1
                        if not spread > np.float32(1e-6) * qq * total:
                            continue
                        next_s = _round_to(s + s * ((qr * total - r1 * q1) / spread), kind)
                        next_b = _round_to(b + (s * r1 - (next_s - s) * q1) / total, kind)
                        if abs(next_s) < _LEAST_SCALE or (next_s == s and next_b == b):
                            continue
                        inverse = _ONE / next_s
                        old = s * inverse
                        by_s = (next_s - s) * inverse
                        by_b = (next_b - b) * inverse
                        for i in range(group):
                            mq = v[MY + i] - v[R + i]
                            r = v[R + i] * old - (mq * by_s + h[M1 + i] * by_b)
                            v[R + i] = r
                            v[MY + i] = mq + r
                            v[Y + i] = (v[X + i] - next_b) * inverse
                        grid[row] = next_s
                        grid[beside + row] = next_b
                        todo[left] = np.int32(row)
                        left += 1
                    count = left
                    if count == 0:
                        break

    return run
