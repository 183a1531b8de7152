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

CHANGES: Final = 4
"""Most changes of codes in one descent, by the size of the group; a tenth of that is usual."""
FITS: Final = 2
"""Most times that scale and bias are fitted to the codes, and the codes to them again."""
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
    """``(w, moments, codes, scales)`` over (rows, cols) bits; improves the codes alone."""
    group = 16 if format == NVFP4 else 32
    fp8 = format == MXFP8
    # In units of the scale: what codes stand for, what is best for each alone, and M E.
    V, BEST, R, HALF, INVERSE = (group * number for number in range(5))

    @jit
    def store(x: np.float32) -> np.uint32:
        return _store_e4m3(x) if fp8 else _store_e2m1(x)

    @jit
    def load(code: np.uint32) -> np.float32:
        return _load_e4m3(code) if fp8 else _load_e2m1(code)

    @jit
    def descend(m: Array, f: Array) -> None:
        """Change the code whose change gains most, until none gains anything: see affine_descent.

        A change by d takes 2 d r - d d M_ii from the error, which pays where the value that is best
        for this code alone is nearer to the new value than to the old.
        """
        j = np.int32(0)
        d = _ZERO
        for _ in range(CHANGES * group):
            best = np.int32(0)
            row = m[j * group : (j + 1) * group]
            for i in range(group):
                r = f[R + i] - d * row[i]
                v = f[V + i] + (d if np.int32(i) == j else _ZERO)
                value = load(store(v + r * f[INVERSE + i]))
                move = value - v
                gain = (r - move * f[HALF + i]) * move
                gain = gain if gain > _ZERO else _ZERO  # NaN, whose sign differs by processor, too
                f[R + i] = r
                f[V + i] = v
                f[BEST + i] = value
                key = np.int32(np.int32(_bits(gain)) & np.int32(~(group - 1)))
                best = max(best, np.int32(key | np.int32(i)))
            if best < np.int32(group):
                break
            j = np.int32(best & np.int32(group - 1))
            d = f[BEST + j] - f[V + j]

    def run(w: Array, moments: Array, codes: Array, scales: Array) -> None:
        kernel(w, moments.reshape(-1), codes, scales, np.empty(5 * group, np.float32))

    @jit
    def kernel(w: Array, moments: Array, codes: Array, scales: Array, f: Array) -> None:
        rows, columns = w.shape
        for g in range(columns // group):
            m = moments[g * group * group : (g + 1) * group * group]
            for i in range(group):
                f[HALF + i] = m[i * group + i] * np.float32(0.5)
                f[INVERSE + i] = _ONE / m[i * group + i]
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
                    v = load(np.uint32(own[i]))
                    f[V + i] = v
                    f[BEST + i] = _load(np.uint32(bits[i]), kind) / s - v
                    f[R + i] = _ZERO
                for j in range(0, group, 4):
                    e0, e1 = f[BEST + j], f[BEST + j + 1]
                    e2, e3 = f[BEST + j + 2], f[BEST + j + 3]
                    for i in range(group):
                        two = e0 * m[j * group + i] + e1 * m[(j + 1) * group + i]
                        more = e2 * m[(j + 2) * group + i] + e3 * m[(j + 3) * group + i]
                        f[R + i] += two + more
                descend(m, f)
                for i in range(group):
                    own[i] = np.uint8(store(f[V + i]))

    return run
