"""The compiled loops of ``quant.lattice``."""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import _INFINITY, BF16, _bits, _float, _load, _store

Array = npt.NDArray[Any]

_ZERO: Final = np.float32(0)
_ULP_ONE: Final = np.float32(2.0**23)
_TRIED: Final = 4
"""Groups of a row that tell whether weights were trained on a grid."""
_FAR: Final = np.float32(np.inf)
_HALF: Final = np.float32(0.5)
_HALF_ULP: Final = np.float32(2.0**-8)
"""Of a bfloat16, by its power of two."""
_ROUNDING: Final = np.float32(1.01 * 2.0**-7)
"""Of a value and of the edge it is measured by, each rounded to bfloat16 by up to 2**-8 of it."""


@jit
def _multiple(r: np.float32) -> bool:
    """Whether a ratio is a whole number, up to rounding."""
    whole = np.float32(r + _ULP_ONE) - _ULP_ONE
    return bool(abs(r - whole) <= r * _ROUNDING)


@cache
def on_grid(kind: int, group: int) -> Kernel:
    """``(row, start, d) -> bool``: whether a group's values are multiples of ``d``, rounded."""

    @jit
    def kernel(row: Array, start: int, d: np.float32) -> bool:
        i = 0
        while i < group and _multiple(abs(_load(np.uint32(row[start + i]), kind) / d)):
            i += 1
        return i == group

    return kernel


@cache
def row_trained(kind: int, group: int) -> Kernel:
    """``(row, edges, middle) -> bool``: whether one of a row's first few groups lies on a grid."""
    fits = on_grid(kind, group)

    @jit
    def kernel(row: Array, edges: Array, middle: np.float32) -> bool:
        for g in range(min(edges.shape[0], _TRIED)):
            edge = _load(np.uint32(edges[g]), kind)
            start = g * group
            if edge != _ZERO and (
                fits(row, start, edge / middle) or fits(row, start, edge / (middle - np.float32(1)))
            ):
                return True
        return False

    return kernel


@cache
def trained(kind: int, group: int) -> Kernel:
    """``(w, edges, middle) -> bool``: whether any row is; other weights cost next to nothing."""
    row_is = row_trained(kind, group)

    @jit
    def kernel(w: Array, edges: Array, middle: np.float32) -> bool:
        r = 0
        while r < w.shape[0] and not row_is(w[r], edges[r], middle):
            r += 1
        return bool(r < w.shape[0])

    return kernel


@cache
def lattice(kind: int, group: int) -> Kernel:
    """``(w, edges, middle, codes, scales, biases)`` over (rows, cols) bits; replaces the last 3.

    ``edges`` (rows, groups) are the values of largest magnitude, perhaps ``biases`` themselves;
    ``middle`` is the code of zero, 2**(bits-1).
    """
    fits = on_grid(kind, group)
    row_is = row_trained(kind, group)

    @jit
    def steps(row: Array, start: int, d: np.float32, out: Array) -> None:
        """``d``, and the middle and the ends of all steps whose multiples round to the values."""
        low = _ZERO
        high = _FAR
        for i in range(group):
            x = abs(_load(np.uint32(row[start + i]), kind))
            k = np.float32(np.rint(abs(x / d)))
            if k > _ZERO:
                power = _float(_bits(x) & _INFINITY)
                rounding = power * _HALF_ULP
                below = rounding * _HALF if x == power else rounding
                low = max(low, (x - below) / k)
                high = min(high, (x + rounding) / k)
        sign = np.float32(1) if d > _ZERO else np.float32(-1)
        out[0] = d
        out[1] = sign * (low + (high - low) * _HALF)
        out[2] = sign * low
        out[3] = sign * high

    @jit
    def error(row: Array, start: int, s: np.float32, b: np.float32, q: Array) -> np.float32:
        """The squared error of codes; -1 where every value rounds to the stored bfloat16."""
        total = _ZERO
        exact = True
        for i in range(group):
            x = _load(np.uint32(row[start + i]), kind)
            e = x - (s * np.float32(q[i]) + b)
            total += e * e
            exact &= e == _ZERO or _store(x - e, BF16) == _store(x, BF16)
        return np.float32(-1) if exact else total

    def run(
        w: Array, edges: Array, middle: np.float32, codes: Array, scales: Array, biases: Array
    ) -> None:
        tried, new = np.empty(4, np.float32), np.empty(group, np.uint8)
        kernel(w, edges, middle, codes, scales, biases, tried, new)

    @jit
    def kernel(
        w: Array,
        edges: Array,
        middle: np.float32,
        codes: Array,
        scales: Array,
        biases: Array,
        tried: Array,
        new: Array,
    ) -> None:
        rows, columns = w.shape
        groups = columns // group
        for r in range(rows):
            row = w[r]
            if not row_is(row, edges[r], middle):  # so that rows do not depend on each other
                continue
            for g in range(groups):
                edge = _load(np.uint32(edges[r, g]), kind)
                start = g * group
                least = _FAR
                for short in range(2):
                    # the edge is -middle steps away from zero, or one step less
                    d = edge / -middle if short == 0 else edge / (middle - np.float32(1))
                    if not fits(row, start, d):
                        continue
                    own = codes[r, start : start + group]
                    if least == _FAR:
                        s = _load(np.uint32(scales[r, g]), kind)
                        least = error(row, start, s, _load(np.uint32(biases[r, g]), kind), own)
                    steps(row, start, d, tried)
                    for t in range(4):
                        bits = np.uint32(_store(tried[t], kind))
                        s = _load(bits, kind)
                        bias = np.uint32(_store(-middle * s, kind))
                        b = _load(bias, kind)
                        if not _ZERO < abs(s) < _FAR or not abs(b) < _FAR:
                            continue
                        for i in range(group):
                            k = np.float32(np.rint(_load(np.uint32(row[start + i]), kind) / s))
                            q = min(max(k + middle, _ZERO), np.float32(2) * middle - np.float32(1))
                            new[i] = np.uint8(q)
                        e = error(row, start, s, b, new)
                        if e < least:
                            least = e
                            for i in range(group):
                                own[i] = new[i]
                            scales[r, g] = bits
                            biases[r, g] = bias

    return run
