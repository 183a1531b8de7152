"""Compiled loops over rows of weights (``quant.compiled``).

Every kernel uses float32 arithmetic and reads and writes floats as their bits (uint16 or uint32),
so the same input gives the same bytes on every machine. ``kind`` names what the bits mean: F32,
BF16 or F16. Kernels that reject an element return the flat index where its group starts, or -1.

Loops are shaped for the vectoriser: constant or whole-row trip counts, selects for branches, casts
that keep 32 bits. Memory comes from the caller: kernels have a function before them that brings it.
"""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit

F32, BF16, F16 = range(3)
MXFP4, MXFP8, NVFP4 = range(3)
CHUNK: Final = 4096

Array = npt.NDArray[Any]

_SIGN: Final = np.uint32(0x80000000)
_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_INFINITY: Final = np.uint32(0x7F800000)
_ZERO: Final = np.float32(0)
_LEAST_SCALE: Final = np.float32(1e-7)
# Adding a power of two whose ulp is 1 (or the least subnormal of a narrower format) rounds half
# to even in hardware and leaves the rounded integer in the low bits of the sum.
_ULP_ONE: Final = np.float32(2.0**23)
_ULP_F16: Final = np.float32(2.0**-1)
_ULP_E4M3: Final = np.float32(2.0**14)
_LEAST_NORMAL_F16: Final = np.float32(2.0**-14)


@jit
def _bits(x: np.float32) -> np.uint32:
    return np.float32(x).view(np.uint32)


@jit
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@jit
def _load(bits: np.uint32, kind: int) -> np.float32:
    b = np.uint32(bits)
    if kind == BF16:
        return _float(b << np.uint32(16))
    if kind == F16:
        m = np.uint32(np.uint32(b & np.uint32(0x7FFF)) << np.uint32(13))
        magnitude = np.uint32(m + np.uint32(0x38000000))
        tiny = _bits(_float(m + np.uint32(0x38800000)) - _LEAST_NORMAL_F16)
        magnitude = tiny if m < np.uint32(0x00800000) else magnitude
        magnitude = np.uint32(m | _INFINITY) if m >= np.uint32(0x0F800000) else magnitude
        return _float(np.uint32(magnitude | ((b & np.uint32(0x8000)) << np.uint32(16))))
    return _float(b)


@jit
def _store(x: np.float32, kind: int) -> np.uint32:
    """Bits of ``x`` rounded half to even; overflow gives infinity, NaN stays NaN."""
    b = _bits(x)
    magnitude = np.uint32(b & _MAGNITUDE)
    if kind == BF16:
        odd = np.uint32((b >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(b + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        quiet = np.uint32((b >> np.uint32(16)) | np.uint32(0x40))
        return quiet if magnitude > _INFINITY else rounded
    if kind == F16:
        sign = np.uint32((b & _SIGN) >> np.uint32(16))
        odd = np.uint32((b >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(
            np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
        )
        tiny = np.uint32(_bits(_float(magnitude) + _ULP_F16) - np.uint32(0x3F000000))
        half = tiny if magnitude < np.uint32(0x38800000) else normal
        half = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else half
        half = np.uint32(0x7E00) if magnitude > _INFINITY else half
        return np.uint32(half | sign)
    return b


@jit
def _store_e4m3(x: np.float32) -> np.uint32:
    """E4M3 bits of ``x`` rounded half to even, saturating at 448, the sign of zero kept."""
    b = _bits(x)
    magnitude = min(np.uint32(b & _MAGNITUDE), np.uint32(0x43E00000))
    odd = np.uint32((magnitude >> np.uint32(20)) & np.uint32(1))
    normal = np.uint32(
        np.uint32(magnitude + np.uint32(0x7FFFF) + odd - np.uint32(0x3C000000)) >> np.uint32(20)
    )
    tiny = np.uint32(_bits(_float(magnitude) + _ULP_E4M3) - np.uint32(0x46800000))
    code = tiny if magnitude < np.uint32(0x3C800000) else normal
    return np.uint32(code | ((b & _SIGN) >> np.uint32(24)))


@jit
def _load_e4m3(bits: np.uint32) -> np.float32:
    magnitude = np.uint32(bits & np.uint32(0x7F))
    normal = _float(np.uint32(magnitude << np.uint32(20)) + np.uint32(0x3C000000))
    tiny = np.float32(magnitude) * np.float32(2.0**-9)
    value = tiny if magnitude < np.uint32(8) else normal
    value = np.float32(np.nan) if magnitude == np.uint32(0x7F) else value
    return -value if bits & np.uint32(0x80) else value


@jit
def _store_e2m1(x: np.float32) -> np.uint32:
    """E2M1 code of ``x``: ties go to the lower magnitude, saturates at 6, no negative zero."""
    b = _bits(x)
    magnitude = min(np.uint32(b & _MAGNITUDE), np.uint32(0x40C00000))
    normal = np.uint32(
        np.uint32(np.uint32(magnitude + np.uint32(0x1FFFFF)) >> np.uint32(22)) - np.uint32(252)
    )
    tiny = np.uint32(1) if magnitude > np.uint32(0x3E800000) else np.uint32(0)
    tiny = np.uint32(2) if magnitude > np.uint32(0x3F400000) else tiny
    code = normal if magnitude >= np.uint32(0x3F800000) else tiny
    sign = np.uint32(np.uint32(b >> np.uint32(28)) & np.uint32(8))
    return np.uint32(code | (sign if code > np.uint32(0) else np.uint32(0)))


@jit
def _load_e2m1(code: np.uint32) -> np.float32:
    magnitude = np.uint32(code & np.uint32(7))
    normal = _float(np.uint32(magnitude << np.uint32(22)) + np.uint32(0x3F000000))
    value = np.float32(magnitude) * np.float32(0.5) if magnitude < np.uint32(2) else normal
    return -value if code & np.uint32(8) else value


@jit
def _round_to(x: np.float32, kind: int) -> np.float32:
    return _load(_store(x, kind), kind) if kind != F32 else x


@jit
def _fold_max(x: Array, group: int) -> None:
    """Leave the maximum of each group (a power of two) of ``x`` at its start, groups packed."""
    size = x.shape[0]
    while group > 1:
        size //= 2
        group //= 2
        for i in range(size):
            x[i] = max(x[2 * i], x[2 * i + 1])


def _layout(kind: int) -> tuple[Any, int, int]:
    """The signed type of the bits, the mask of all but the sign, and the bits of infinity."""
    if kind == F32:
        return np.int32, 0x7FFFFFFF, 0x7F800000
    return np.int16, 0x7FFF, 0x7F80 if kind == BF16 else 0x7C00


@cache
def affine_codes(kind: int, group: int) -> Kernel:
    """``(w, levels, stored, codes, scales, biases) -> int`` over (rows, cols) bits.

    Scale and bias as mx.quantize on CPU: the edge of larger magnitude is hit exactly. Codes come
    from the scale and bias as stored if ``stored``, else from their unrounded float32 values.
    Rejects non-finite elements, and groups too wide for float32 if ``stored``.
    """
    signed, mask, infinity = _layout(kind)
    shift = mask.bit_length()

    def run(
        w: Array, levels: np.float32, stored: bool, codes: Array, scales: Array, biases: Array
    ) -> int:
        columns = w.shape[1]
        extremes = np.empty((2, columns), signed)
        grid = np.empty((2, columns // group), np.float32)
        return int(kernel(w, levels, stored, codes, scales, biases, extremes, grid))

    @jit
    def kernel(
        w: Array,
        levels: np.float32,
        stored: bool,
        codes: Array,
        scales: Array,
        biases: Array,
        extremes: Array,
        grid: Array,
    ) -> int:
        rows, columns = w.shape
        groups = columns // group
        most, least = extremes[0], extremes[1]
        scale, bias = grid[0], grid[1]
        for r in range(rows):
            row = w[r]
            # Order-preserving integers: their extremes vectorise, and show NaN.
            for i in range(columns):
                x = signed(row[i])
                key = signed(x ^ (signed(x >> signed(shift)) & signed(mask)))
                most[i] = key
                least[i] = ~key
            _fold_max(most, group)
            _fold_max(least, group)
            for g in range(groups):
                if most[g] >= infinity or least[g] >= infinity:
                    return int(r * columns + g * group)
            for g in range(groups):
                x = most[g]
                y = signed(~least[g])
                x = signed(x ^ (signed(x >> signed(shift)) & signed(mask)))
                y = signed(y ^ (signed(y >> signed(shift)) & signed(mask)))
                high = _load(np.uint32(x) & np.uint32(2 * mask + 1), kind)
                low = _load(np.uint32(y) & np.uint32(2 * mask + 1), kind)
                s = max(np.float32(high - low) / levels, _LEAST_SCALE)
                negative = abs(low) > abs(high)
                s = s if negative else -s
                edge = low if negative else high
                steps = np.float32(np.rint(edge / s))
                s = s if steps == _ZERO else edge / steps
                edge = _ZERO if steps == _ZERO else edge
                scale_bits = _store(s, kind)
                bias_bits = _store(edge, kind)
                scales[r, g] = scale_bits
                biases[r, g] = bias_bits
                scale[g] = _load(scale_bits, kind) if stored else s
                bias[g] = _load(bias_bits, kind) if stored else edge
            for g in range(groups):
                s = scale[g]
                edge = bias[g]
                if stored and not abs(s) < np.float32(np.inf):
                    return int(r * columns + g * group)
                source = row[g * group : (g + 1) * group]
                out = codes[r, g * group : (g + 1) * group]
                for i in range(group):
                    q = (_load(np.uint32(source[i]), kind) - edge) / s
                    q = min(max(q, _ZERO), levels)
                    out[i] = np.uint8(_bits(q + _ULP_ONE) & np.uint32(0xFF))
        return -1

    return run


@cache
def affine_values(kind: int, group: int) -> Kernel:
    """``(codes, scales, biases, out)``: scale * code + bias, each rounded to ``kind``."""

    @jit
    def kernel(codes: Array, scales: Array, biases: Array, out: Array) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            for g in range(columns // group):
                scale = _load(np.uint32(scales[r, g]), kind)
                bias = _load(np.uint32(biases[r, g]), kind)
                for i in range(group):
                    product = _round_to(np.float32(codes[r, g * group + i]) * scale, kind)
                    out[r, g * group + i] = _store(product + bias, kind)

    return kernel


@jit
def _ceil_exponent(x: np.float32) -> np.int32:
    """The least e with 2**e >= x, and 0 for 0."""
    normal = np.int32(_bits(x))
    tiny = np.int32(_bits(x * np.float32(2.0**32)))
    subnormal = normal < np.int32(0x00800000)
    b = tiny if subnormal else normal
    least = np.int32(-159 if subnormal else -127)
    e = np.int32(np.int32(np.int32(b + np.int32(0x7FFFFF)) >> np.int32(23)) + least)
    return np.int32(e if normal > np.int32(0) else 0)


@jit
def _power_of_two(e: np.int32) -> np.float32:
    normal = np.uint32(np.uint32(e + np.int32(127)) << np.uint32(23))
    tiny = np.uint32(np.uint32(1) << np.uint32(np.uint32(e + np.int32(149)) & np.uint32(31)))
    return _float(tiny if e < np.int32(-126) else normal)


@cache
def mxfp8_codes(kind: int) -> Kernel:
    """``(w, stock, codes, scales) -> int`` over (rows, cols) bits; one code per byte.

    ``stock`` repeats mx.quantize on CPU outside the range of the format too, where it wraps block
    exponents under -127; otherwise these saturate. Rejects non-finite elements.
    """
    group = 32
    top = np.float32(448)
    signed, magnitude, infinity = _layout(kind)

    def run(w: Array, stock: bool, codes: Array, scales: Array) -> int:
        columns = w.shape[1]
        most, scale = np.empty(columns, signed), np.empty(columns // group, np.float32)
        return int(kernel(w, stock, codes, scales, most, scale))

    @jit
    def kernel(
        w: Array, stock: bool, codes: Array, scales: Array, most: Array, scale: Array
    ) -> int:
        rows, columns = w.shape
        groups = columns // group
        for r in range(rows):
            row = w[r]
            for i in range(columns):
                most[i] = signed(row[i] & magnitude)
            _fold_max(most, group)
            for g in range(groups):
                if most[g] >= infinity:
                    return int(r * columns + g * group)
            for g in range(groups):
                exponent = _ceil_exponent(_round_to(_load(np.uint32(most[g]), kind) / top, kind))
                if not stock:
                    exponent = max(exponent, np.int32(-127))
                scale[g] = _power_of_two(exponent)
                scales[r, g] = np.uint32(np.uint32(exponent + np.int32(127)) & np.uint32(0xFF))
            for g in range(groups):
                s = scale[g]
                source = row[g * group : (g + 1) * group]
                out = codes[r, g * group : (g + 1) * group]
                for i in range(group):
                    out[i] = _store_e4m3(_load(np.uint32(source[i]), kind) / s)
        return -1

    return run


@cache
def microscaled_values(kind: int, format: int) -> Kernel:
    """``(codes, scales, out)``: scale * value, with scale and product rounded to ``kind``."""
    group = 16 if format == NVFP4 else 32

    @jit
    def kernel(codes: Array, scales: Array, out: Array) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            for g in range(columns // group):
                s = np.uint32(scales[r, g])
                scale = _round_to(
                    _load_e4m3(s) if format == NVFP4 else _power_of_two(np.int32(s) - 127), kind
                )
                for i in range(group):
                    c = np.uint32(codes[r, g * group + i])
                    value = _load_e4m3(c) if format == MXFP8 else _load_e2m1(c)
                    out[r, g * group + i] = _store(value * scale, kind)

    return kernel


@cache
def casting(source: int, target: int) -> Kernel:
    """``(x, out) -> int`` over flat bits in groups of CHUNK; rejects overflow of finite values."""
    infinity = _layout(target)[2]

    @jit
    def kernel(x: Array, out: Array) -> int:
        for start in range(0, x.shape[0], CHUNK):
            chunk = x[start : start + CHUNK]
            target_chunk = out[start : start + CHUNK]
            overflow = np.uint32(0)
            for i in range(chunk.shape[0]):
                value = _load(np.uint32(chunk[i]), source)
                y = _store(value, target)
                target_chunk[i] = y
                infinite = np.uint32(y & np.uint32(infinity)) == np.uint32(infinity)
                finite = np.uint32(_bits(value) & _MAGNITUDE) < _INFINITY
                overflow = np.uint32(overflow | np.uint32(1 if infinite & finite else 0))
            if overflow:
                return start
        return -1

    return kernel
