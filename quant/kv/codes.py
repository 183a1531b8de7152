"""Codes and norms as they lie in a cache: packed bytes, and norms in one or two of them."""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import mlx.core as mx

UNIT: Final = 8
"""Codes whose bits of any width fill whole bytes."""
_MANTISSA: Final = 10
_BIAS: Final = 127 - 31
"""Smallest exponent of a stored norm is 2^-31, the largest 2^32."""
STEPS: Final = 32
"""Norms of one byte have this many steps an octave, 255 of them down from the largest."""


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes [..., count] of up to 8 bits -> bytes [..., count * bits / 8], least significant first.

    ``count`` is a multiple of eight.
    """
    import mlx.core as mx

    codes = codes.astype(mx.uint8)
    if bits == 8:
        return codes
    period = 8 // gcd(bits, 8)
    split = codes.reshape(*codes.shape[:-1], -1, period)
    each = [split[..., index] for index in range(period)]
    out = []
    for start in range(0, period * bits, 8):
        total = None
        for index, code in enumerate(each):
            at = index * bits - start
            if -bits < at < 8:  # what lies beyond the byte is lost
                part = code << at if at >= 0 else code >> -at
                total = part if total is None else total | part
        assert total is not None
        out.append(total)
    if len(out) == 1:
        return out[0]
    return mx.stack(out, axis=-1).reshape(*codes.shape[:-1], -1)


def fields(packed: mx.array, width: int) -> mx.array:
    """Numbers of ``width`` bits, up to 16, from bytes [..., count * width / 8]."""
    import mlx.core as mx

    if width == 8:
        return packed
    if width == 16:
        return mx.view(packed, mx.uint16)
    if 8 % width == 0:
        shifts = mx.arange(8 // width, dtype=mx.uint8) * width
        split = (packed[..., None] >> shifts) & ((1 << width) - 1)
        return split.reshape(*packed.shape[:-1], -1)
    period = width // gcd(width, 8)
    octets = packed.reshape(*packed.shape[:-1], -1, period)
    found = []
    for start in range(0, 8 * period, width):
        first, shift = divmod(start, 8)
        kind = mx.uint16 if shift + width <= 16 else mx.uint32
        number = octets[..., first].astype(kind) >> shift
        for more in range(1, (shift + width + 7) // 8):
            number = number | (octets[..., first + more].astype(kind) << (8 * more - shift))
        found.append((number & ((1 << width) - 1)).astype(mx.uint16))
    return mx.stack(found, axis=-1).reshape(*packed.shape[:-1], -1)


def pack_norms(norms: mx.array) -> mx.array:
    """Non-negative float32 -> uint16 with six bits of exponent and ten of mantissa.

    Half precision overflows at 65504 and loses precision under 6e-5; these keep eleven
    significant bits from 2^-31 to 2^32, rounded to nearest. Zero and what lies below are zero.
    """
    import mlx.core as mx

    drop = 23 - _MANTISSA
    bits = mx.view(norms.astype(mx.float32), mx.uint32)
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    low = _BIAS << _MANTISSA
    kept = mx.clip(rounded, low, low + 0xFFFF) - low
    return kept.astype(mx.uint16)


def unpack_norms(packed: mx.array) -> mx.array:
    """Inverse of :func:`pack_norms`, float32."""
    import mlx.core as mx

    bits = (packed.astype(mx.uint32) + (_BIAS << _MANTISSA)) << (23 - _MANTISSA)
    return mx.where(packed == 0, mx.array(0.0), mx.view(bits, mx.float32))


def pack_short_norms(norms: mx.array, top: float, lift: mx.array | None = None) -> mx.array:
    """Non-negative float32 -> uint8: steps of a 32nd of an octave down from ``top``, then zero.

    To the nearest step. With ``lift`` [..., 1] in [0, 1) to the step above where the norm's place
    between two steps is higher than it, so that the mean over uniform lifts is the norm itself.
    """
    import mlx.core as mx

    levels = _levels(top)
    # A hair up, so that a norm that is a step's own is not taken for the one below.
    place = mx.log2(mx.maximum(norms, 1e-30) / top) * STEPS + (255.0 + 1e-3)
    if lift is None:
        return mx.clip(mx.round(place), 0, 255).astype(mx.uint8)
    low = mx.clip(mx.floor(place), 0, 254).astype(mx.uint8)
    under, over = levels[low], levels[low + 1]
    up: mx.array = (norms - under) > lift * (over - under)
    return low + up.astype(mx.uint8)


def unpack_short_norms(packed: mx.array, top: float) -> mx.array:
    """Inverse of :func:`pack_short_norms`, float32."""
    found: mx.array = _levels(top)[packed]
    return found


@cache
def _levels(top: float) -> Any:
    import mlx.core as mx
    import numpy as np

    levels = top * 2.0 ** ((np.arange(256) - 255.0) / STEPS)
    levels[0] = 0.0
    return mx.array(levels.astype(np.float32))
