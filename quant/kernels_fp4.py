"""Compiled rounding to E2M1 codes under a scale for each group: mxfp4 and nvfp4.

No weight is divided by its scale. E2M1 rounds at seven edges, with ties to the lower magnitude,
and floats of one sign are ordered as their bits: a code's magnitude is the number of the edges,
times the scale, that the bits of the weight exceed. Both scales have few bits, so that an edge
times a scale is exact, and a float32 above it is above it after division and rounding as well.
"""

from functools import cache
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import (
    BF16,
    F16,
    F32,
    NVFP4,
    _ceil_exponent,
    _fold_max,
    _layout,
    _load,
    _load_e2m1,
    _round_to,
    _store_e4m3,
)

Array = npt.NDArray[Any]

_EDGES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Above them E2M1 rounds to 0.5, 1, 1.5, 2, 3, 4 and 6."""
_STRIDE: Final = 8
_LEAST_EXPONENT: Final = -149
"""Of the block scales that mx.quantize divides by: down to the least subnormal of float32."""
_DISTINCT: Final = 2.0**21
"""Beyond it float32 tells the distances to the E2M1 values from one another no more."""
_TOP_SCALE: Final = np.uint32(0x7E)


@cache
def scaled_edges(kind: int, format: int) -> Array:
    """(scales * 8,) bits: the edges under each scale rounded down to ``kind``, and one unused.

    Scales are the E4M3 codes of nvfp4, and for mxfp4 the powers of two from 2**-149 on. Nothing
    exceeds the edges under a scale of zero.
    """
    if format == NVFP4:
        scales = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        scales[0] = np.inf
    else:
        scales = np.exp2(np.arange(_LEAST_EXPONENT, 128, dtype=np.float64))
    exact = scales[:, None] * np.array([*_EDGES, np.inf])
    with np.errstate(over="ignore"):
        near = exact.astype(np.float16 if kind == F16 else np.float32)
    down = np.where(near > exact, np.nextafter(near, near.dtype.type(0)), near)
    bits: Array = down.view(np.int16 if kind == F16 else np.int32).reshape(-1)
    return np.right_shift(bits, 16).astype(np.int16) if kind == BF16 else bits


@jit
def _first_nearest(x: np.float32) -> np.uint32:
    """First code at the least distance in float32, where far from all of them many are equal."""
    best = np.uint32(0)
    distance = np.float32(np.inf)
    for code in range(16):
        d = abs(x - _load_e2m1(np.uint32(code)))
        if d < distance:
            distance = d
            best = np.uint32(code)
    return best


@cache
def e2m1_codes(kind: int, format: int) -> Kernel:
    """``(w, stock, packed, scales) -> int`` over (rows, cols) bits; two codes per byte.

    ``stock`` repeats mx.quantize on CPU outside the range of the formats too, where it wraps
    block exponents under -127 and loses nvfp4 values far beyond 2688; otherwise these saturate.
    Rejects non-finite elements as the kernels of ``quant.kernels`` do.
    """
    group = 16 if format == NVFP4 else 32
    top = np.float32(6)
    signed, magnitude, infinity = _layout(kind)
    sign = 28 if kind == F32 else 12
    far = int(np.float32(_DISTINCT * 448).view(np.uint32)) >> (0 if kind == F32 else 16)
    far = infinity if kind == F16 else far

    def run(w: Array, stock: bool, packed: Array, scales: Array) -> int:
        columns = w.shape[1]
        most, line = np.empty(columns, signed), np.empty(columns, np.uint8)
        return int(kernel(w, stock, packed, scales, most, scaled_edges(kind, format), line))

    @jit
    def choose(most: Array, stock: bool, scales: Array) -> None:
        """Scales from the largest magnitude of each group, which becomes the scale's number."""
        for g in range(scales.shape[0]):
            wanted = _round_to(_load(np.uint32(most[g]), kind) / top, kind)
            if format == NVFP4:
                code = _store_e4m3(wanted)
                most[g] = signed(code)
            else:
                exponent = _ceil_exponent(wanted)
                if not stock:
                    exponent = max(exponent, np.int32(-127))
                code = np.uint32(np.uint32(exponent + np.int32(127)) & np.uint32(0xFF))
                most[g] = signed(exponent - np.int32(_LEAST_EXPONENT))
            scales[g] = code

    @jit
    def compare(row: Array, most: Array, edges: Array, line: Array) -> None:
        # Unsigned places: a group takes less time than the bounds of a slice, or of an index
        # that could count from the end.
        for g in range(row.shape[0] // group):
            at = np.uint64(most[g]) * np.uint64(_STRIDE)
            e0 = signed(edges[at])
            e1 = signed(edges[at + np.uint64(1)])
            e2 = signed(edges[at + np.uint64(2)])
            e3 = signed(edges[at + np.uint64(3)])
            e4 = signed(edges[at + np.uint64(4)])
            e5 = signed(edges[at + np.uint64(5)])
            e6 = signed(edges[at + np.uint64(6)])
            start = np.uint64(g * group)
            for i in range(group):
                x = signed(row[start + np.uint64(i)])
                m = signed(x & signed(magnitude))
                some = m > e0
                code = signed(signed(some) + signed(m > e1))
                code = signed(code + signed(m > e2))
                code = signed(code + signed(m > e3))
                code = signed(code + signed(m > e4))
                code = signed(code + signed(m > e5))
                code = signed(code + signed(m > e6))
                minus = signed(signed(x >> signed(sign)) & signed(8))
                minus = minus if some else signed(0)
                line[start + np.uint64(i)] = np.uint8(signed(code | minus))

    @jit
    def lose(row: Array, scales: Array, line: Array) -> None:
        for i in range(row.shape[0]):
            x = _load(np.uint32(row[i]), kind) / np.float32(448)
            if np.uint32(scales[i // group]) == _TOP_SCALE and abs(x) > np.float32(_DISTINCT):
                line[i] = _first_nearest(_round_to(x, kind))

    @jit
    def kernel(
        w: Array, stock: bool, packed: Array, scales: Array, most: Array, edges: Array, line: Array
    ) -> int:
        rows, columns = w.shape
        groups = columns // group
        for r in range(rows):
            row = w[r]
            for i in range(columns):
                most[i] = signed(row[i] & magnitude)
            _fold_max(most, group)
            largest = signed(0)
            for g in range(groups):
                largest = most[g] if most[g] > largest else largest
            if largest >= infinity:
                for g in range(groups):
                    if most[g] >= infinity:
                        return int(r * columns + g * group)
            choose(most, stock, scales[r])
            compare(row, most, edges, line)
            if format == NVFP4 and stock and largest > far:
                lose(row, scales[r], line)
            words = line.view(np.uint16)
            out = packed[r]
            for i in range(columns // 2):
                x = np.uint16(words[i])
                out[i] = np.uint8(np.uint16(x | np.uint16(x >> np.uint16(4))) & np.uint16(0xFF))
        return -1

    return run
