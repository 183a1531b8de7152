"""Codes and norms as they lie in a cache: packed words, and 16-bit norms that do not overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import mlx.core as mx

_PLANES: Final = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (5,), 6: (6,), 7: (4, 3), 8: (8,)}
"""Widths that add up to a code: those that mx.dequantize unpacks, and single bits."""
_GROUP: Final = 32
_MANTISSA: Final = 10
_BIAS: Final = 127 - 31
"""Smallest exponent of a stored norm is 2^-31, the largest 2^32."""


def words(dim: int, bits: int) -> int:
    """uint32 words that hold ``dim`` codes; ``dim`` is a multiple of 32 from 4 dimensions up."""
    return dim * bits // 32


def pack(codes: mx.array, bits: int) -> mx.array:
    """uint32 codes [..., dim] -> words [..., dim * bits / 32], least significant bit first."""
    import mlx.core as mx

    parts, shift = [], 0
    for width in _PLANES[bits]:
        plane = (codes >> shift) & ((1 << width) - 1)
        parts.append(_pack_plane(plane, width))
        shift += width
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def _pack_plane(codes: mx.array, width: int) -> mx.array:
    """32 codes make ``width`` words, by the positions of their bits in one long stream."""
    import mlx.core as mx

    if 32 % width == 0:
        count = 32 // width
        shifts = mx.arange(count, dtype=mx.uint32) * width
        split = codes.reshape(*codes.shape[:-1], -1, count)
        return (split << shifts).sum(axis=-1).astype(mx.uint32)
    split = codes.reshape(*codes.shape[:-1], -1, 32)
    out = []
    for word in range(width):
        total = None
        for index in range(32):
            at = index * width - word * 32
            if -width < at < 32:
                code = split[..., index]
                part = code << at if at >= 0 else code >> -at
                total = part if total is None else total | part
        out.append(total)
    stacked = mx.stack([word for word in out if word is not None], axis=-1)
    return stacked.reshape(*codes.shape[:-1], -1)


def unpack(packed: mx.array, bits: int, dim: int) -> mx.array:
    """Inverse of :func:`pack`: codes [..., dim] as float32 whole numbers."""
    import mlx.core as mx

    total, start, scale = None, 0, 1.0
    for width in _PLANES[bits]:
        size = words(dim, width)
        plane = _unpack_plane(packed[..., start : start + size], width, dim, scale)
        total = plane if total is None else total + plane
        start, scale = start + size, scale * (1 << width)
    assert isinstance(total, mx.array)
    return total


def _unpack_plane(packed: mx.array, width: int, dim: int, scale: float) -> mx.array:
    import mlx.core as mx

    if width == 1:
        shifts = mx.arange(32, dtype=mx.uint32)
        bits = (packed[..., None] >> shifts) & 1
        return bits.reshape(*packed.shape[:-1], dim).astype(mx.float32) * scale
    # mx.dequantize unpacks this layout on every backend: code * scale + bias.
    shape = (*packed.shape[:-1], dim // _GROUP)
    scales = mx.full(shape, scale, dtype=mx.float32)
    return mx.dequantize(packed, scales, mx.zeros(shape), group_size=_GROUP, bits=width)


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
