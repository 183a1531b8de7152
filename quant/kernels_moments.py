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
    _bits,
    _float,
    _load,
    _load_e2m1,
    _load_e4m3,
    _power_of_two,
    _round_to,
    _store,
    _store_e2m1,
    _store_e4m3,
)
from quant.kernels_search import fold_sum, round_e2m1, round_e4m3

Array = npt.NDArray[Any]

CHANGES: Final = 4
"""Most changes of codes in one descent, by the size of the group; a tenth of that is usual."""
FITS: Final = 2
"""Most times that scale and bias are fitted to the codes, and the codes to them again."""
BESIDE: Final = 16
"""Rows whose codes are changed in turns."""
_ZERO: Final = np.float32(0)
_ONE: Final = np.float32(1)
_ULP_ONE: Final = np.float32(2.0**23)
_SIGN: Final = np.uint32(0x80000000)
_LEAST_SCALE: Final = np.float32(1e-7)


@cache
def affine_descent(kind: int, group: int) -> Kernel:
    """``(w, moments, levels, codes, scales, biases)`` over (rows, cols) bits.

    ``moments`` is (cols / group, group, group) float32, symmetric with a positive diagonal. Codes,
    scales and biases are read and improved; no group's error grows.
    """
    # Where each vector of a group starts. Weights and errors are in units of the scale: Y is
    # (X - bias) / scale, and E what codes Q miss of it; R is M E, MY is M Y and M1 is M 1.
    X, Y, Q, E, R, MY, M1, HALF, T = (group * number for number in range(9))
    strips = group // 16
    fold = fold_sum(16)
    sign_shift = 32 - group.bit_length()

    @jit
    def multiply(m: Array, f: Array) -> None:
        """R and MY from E and Y, four columns at a time."""
        for i in range(group):
            f[R + i] = _ZERO
            f[MY + i] = _ZERO
        for j in range(0, group, 4):
            e0, e1, e2, e3 = f[E + j], f[E + j + 1], f[E + j + 2], f[E + j + 3]
            y0, y1, y2, y3 = f[Y + j], f[Y + j + 1], f[Y + j + 2], f[Y + j + 3]
            for i in range(group):
                m0 = m[j * group + i]
                m1 = m[(j + 1) * group + i]
                m2 = m[(j + 2) * group + i]
                m3 = m[(j + 3) * group + i]
                f[R + i] += (e0 * m0 + e1 * m1) + (e2 * m2 + e3 * m3)
                f[MY + i] += (y0 * m0 + y1 * m1) + (y2 * m2 + y3 * m3)

    @jit
    def descend(m: Array, f: Array, n: np.float32) -> None:
        """Change the code by one whose change gains most, until none gains anything.

        A change by d = 1 or -1 takes 2 d r - M_ii from the error. Its gain, as the bits of a float,
        carries sign and index in place of its last digits: the greatest of all is one reduction.
        """
        j = np.int32(0)
        d = _ZERO
        for _ in range(CHANGES * group):
            best = np.int32(0)
            row = m[j * group : (j + 1) * group]
            for i in range(group):
                r = f[R + i] - d * row[i]
                q = f[Q + i] + (d if np.int32(i) == j else _ZERO)
                f[R + i] = r
                f[Q + i] = q
                end = n if r > _ZERO else _ZERO
                gain = abs(r) - f[HALF + i]
                gain = gain if q != end else _ZERO
                sign = np.int32((_bits(r) & _SIGN) >> np.uint32(sign_shift))
                place = np.int32(sign | np.int32(i))
                key = np.int32(np.int32(_bits(gain)) & np.int32(~(2 * group - 1)))
                best = max(best, np.int32(key | place))
            if best < np.int32(2 * group):
                break
            j = np.int32(best & np.int32(group - 1))
            d = -_ONE if best & np.int32(group) else _ONE

    @jit
    def add(f: Array) -> None:
        """Sums of a fit in strips of 16: of the error, of M Q, Q M Q, Q R and R."""
        for i in range(16):
            e = _ZERO
            q1 = _ZERO
            qq = _ZERO
            qr = _ZERO
            r1 = _ZERO
            for strip in range(strips):
                q = f[Q + i + 16 * strip]
                r = f[R + i + 16 * strip]
                mq = f[MY + i + 16 * strip] - r
                e += (f[Y + i + 16 * strip] - q) * r
                q1 += mq
                qq += q * mq
                qr += q * r
                r1 += r
            f[T + i] = e
            f[T + 16 + i] = q1
            f[T + 32 + i] = qq
            f[T + 48 + i] = qr
            f[T + 64 + i] = r1

    @jit
    def sum_rows(m: Array, f: Array) -> np.float32:
        """M1 and half the diagonal; returns the sum of all of M."""
        for i in range(group):
            f[M1 + i] = _ZERO
            f[HALF + i] = m[i * group + i] * np.float32(0.5)
        for j in range(group):
            for i in range(group):
                f[M1 + i] += m[j * group + i]
        for i in range(16):
            total = _ZERO
            for strip in range(strips):
                total += f[M1 + i + 16 * strip]
            f[T + i] = total
        return np.float32(fold(f, T))

    def run(
        w: Array, moments: Array, levels: np.float32, codes: Array, scales: Array, biases: Array
    ) -> None:
        f = np.empty(8 * group + 5 * 16, np.float32)
        kernel(w, moments.reshape(-1), levels, codes, scales, biases, f)

    @jit
    def kernel(
        w: Array,
        moments: Array,
        levels: np.float32,
        codes: Array,
        scales: Array,
        biases: Array,
        f: Array,
    ) -> None:
        rows, columns = w.shape
        for g in range(columns // group):
            m = moments[g * group * group : (g + 1) * group * group]
            total = sum_rows(m, f)
            for row in range(rows):
                s = _load(np.uint32(scales[row, g]), kind)
                b = _load(np.uint32(biases[row, g]), kind)
                inverse = _ONE / s
                own = codes[row, g * group : (g + 1) * group]
                bits = w[row, g * group : (g + 1) * group]
                for i in range(group):
                    x = _load(np.uint32(bits[i]), kind)
                    q = np.float32(own[i])
                    y = (x - b) * inverse
                    f[X + i] = x
                    f[Y + i] = y
                    f[Q + i] = q
                    f[E + i] = y - q
                multiply(m, f)
                least = np.float32(np.inf)
                for fits in range(FITS + 1):
                    descend(m, f, levels)
                    add(f)
                    found = fold(f, T) * s * s
                    if not found < least:
                        break
                    least = found
                    scales[row, g] = _store(s, kind)
                    biases[row, g] = _store(b, kind)
                    for i in range(group):
                        own[i] = np.uint8(_bits(f[Q + i] + _ULP_ONE) & np.uint32(0xFF))
                    if fits == FITS:
                        break
                    q1, qq = fold(f, T + 16), fold(f, T + 32)
                    qr, r1 = fold(f, T + 48), fold(f, T + 64)
                    spread = qq * total - q1 * q1
                    if not spread > np.float32(1e-6) * qq * total:
                        break
                    next_s = _round_to(s + s * ((qr * total - r1 * q1) / spread), kind)
                    next_b = _round_to(b + (s * r1 - (next_s - s) * q1) / total, kind)
                    if abs(next_s) < _LEAST_SCALE or (next_s == s and next_b == b):
                        break
                    inverse = _ONE / next_s
                    old = s * inverse
                    by_s = (next_s - s) * inverse
                    by_b = (next_b - b) * inverse
                    for i in range(group):
                        mq = f[MY + i] - f[R + i]
                        r = f[R + i] * old - (mq * by_s + f[M1 + i] * by_b)
                        f[R + i] = r
                        f[MY + i] = mq + r
                        f[Y + i] = (f[X + i] - next_b) * inverse
                    s = next_s
                    b = next_b

    return run


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
    U1, U2, U3, U4, U5, U6, U7 = (np.uint64(k) for k in range(1, 8))
    M1, M2, M3, M4 = (np.uint64(STRIDE * k) for k in range(1, 5))

    @jit
    def store(x: np.float32) -> np.uint32:
        return _store_e4m3(x) if fp8 else _store_e2m1(x)

    @jit
    def load(code: np.uint32) -> np.float32:
        return _load_e4m3(code) if fp8 else _load_e2m1(code)

    @jit
    def nearest(z: np.float32) -> np.float32:
        size = abs(z)
        value = round_e4m3(size) if fp8 else round_e2m1(size)
        return _float(np.uint32(_bits(value) | (_bits(z) & _SIGN)))

    @jit
    def change(m: Array, f: Array, row: int, j: int, d: np.float32) -> np.int32:
        """Change V of element ``j`` by ``d``; the gain and place of the next change: see below.

        A change by d takes 2 d r - d d M_ii from the error, which pays where the value that is best
        for this code alone is nearer to the new value than to the old.
        """
        best = np.int32(0)
        at = np.uint64(row * group)
        of_m = np.uint64(j * STRIDE)
        for i in range(group):
            place = at + np.uint64(i)
            beside = of_m + np.uint64(i)
            r = f[place + np.uint64(R)] - d * m[beside]
            v = f[place + np.uint64(V)] + (d if np.int32(i) == np.int32(j) else _ZERO)
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
                j = int(todo[BESIDE + k])
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
        """R from the errors of a row, which are in place of BEST; BEST becomes V."""
        for i in range(group):
            f[np.uint64(R + row * group + i)] = _ZERO
        for half in range(group // 16):
            at = np.uint64(BEST + row * group + 16 * half)
            e0, e1, e2, e3 = f[at], f[at + U1], f[at + U2], f[at + U3]
            e4, e5, e6, e7 = f[at + U4], f[at + U5], f[at + U6], f[at + U7]
            at = np.uint64(BEST + row * group + 16 * half + 8)
            e8, e9, ea, eb = f[at], f[at + U1], f[at + U2], f[at + U3]
            ec, ed, ee, ef = f[at + U4], f[at + U5], f[at + U6], f[at + U7]
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
