"""TurboQuant: rotate, then store each coordinate at the nearest centroid of its distribution.

arXiv 2504.19874. Departures, each measured: the norm that is stored makes inner products unbiased
(keys) or the squared error least (values), where the paper stores the vector's own; a few scales
are tried per vector when it is encoded; and the 1-bit stage of the residual (``residual_bit``) is
there for comparison only, because it loses to one more bit of the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from quant.kv.codebook import codebook
from quant.kv.codec import Packed
from quant.kv.codes import pack, pack_norms, unpack, unpack_norms
from quant.kv.rotation import Rotation

if TYPE_CHECKING:
    import mlx.core as mx

Norm = Literal["own", "unbiased", "least"]
_UNIT: Final = 32
"""Channels whose codes of any width fill whole words."""
_SPREAD: Final = {1: 0.3, 2: 0.3, 3: 0.25, 4: 0.2, 5: 0.15, 6: 0.1, 7: 0.06, 8: 0.04}
"""How far from 1 the scales that are tried reach, by bits."""


class KvError(ValueError):
    """A cache cannot be stored as asked; the message says why and what can."""


@dataclass(frozen=True, kw_only=True)
class TurboCodec:
    """``bits`` per coordinate, whole or halves and quarters, plus a 16-bit norm per vector.

    A fraction is an honest split: that share of the channels, in units of 32, has one bit more.
    ``norm``: "own" stores the vector's norm; "unbiased" divides it by the inner product with the
    code, so that E<q, x^> = <q, x> over rotations; "least" stores the least-squares scale.
    ``tries``: scales tried per vector when encoding; 1 takes the vector as it is.
    KvError where the width does not divide or the bits are out of range.
    """

    dim: int
    bits: float
    rotation: Rotation
    norm: Norm = "unbiased"
    tries: int = 1
    segments: tuple[tuple[int, int, int], ...] = field(init=False)
    """(first channel, one past the last, bits)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", split_channels(self.dim, self.bits))

    @property
    def effective_bits(self) -> float:
        """Bits per channel with the norm."""
        return (sum((end - start) * bits for start, end, bits in self.segments) + 16) / self.dim

    def encode(self, x: mx.array) -> Packed:
        """Vectors [..., dim] -> (words of each segment ..., norms [..., 1])."""
        import mlx.core as mx

        y = self.rotation.forward(x.astype(mx.float32))
        size = mx.linalg.norm(y, axis=-1, keepdims=True)
        unit = y / mx.maximum(size, 1e-30)
        codes, estimate = self._nearest(unit)
        along = (unit * estimate).sum(axis=-1, keepdims=True)
        if self.tries > 1:
            codes, estimate, along = self._search(unit, codes, estimate, along)
        if self.norm == "unbiased":
            size = size / mx.maximum(along, 1e-6)
        elif self.norm == "least":
            size = size * along / mx.maximum((estimate**2).sum(axis=-1, keepdims=True), 1e-12)
        words = (pack(codes[..., start:end], bits) for start, end, bits in self.segments)
        return (*words, pack_norms(size))

    def decode(self, packed: Packed) -> mx.array:
        """Packed arrays -> vectors [..., dim] in the rotated basis."""
        import mlx.core as mx

        parts = [
            _lookup(words, bits, end - start, self.dim)
            for words, (start, end, bits) in zip(packed[:-1], self.segments, strict=True)
        ]
        unit = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        return unit * unpack_norms(packed[-1])

    def _nearest(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """Codes and their centroids, for vectors of norm about one."""
        import mlx.core as mx

        codes, values = [], []
        for start, end, bits in self.segments:
            grid = _grid(self.dim, bits)
            code = grid.nearest(unit[..., start:end])
            codes.append(code)
            values.append(grid.centers[code])
        if len(codes) == 1:
            return codes[0], values[0]
        return mx.concatenate(codes, axis=-1), mx.concatenate(values, axis=-1)

    def _search(
        self, unit: mx.array, codes: mx.array, estimate: mx.array, along: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Of a few scales, the codes whose direction is nearest: least error at the best norm."""
        import mlx.core as mx

        best = along**2 / mx.maximum((estimate**2).sum(axis=-1, keepdims=True), 1e-12)
        reach = _SPREAD[max(bits for *_, bits in self.segments)]
        for scale in np.linspace(1.0 - reach, 1.0 + reach, self.tries):
            if abs(scale - 1.0) < 1e-9:
                continue
            other, value = self._nearest(unit * float(scale))
            inner = (unit * value).sum(axis=-1, keepdims=True)
            found = inner**2 / mx.maximum((value**2).sum(axis=-1, keepdims=True), 1e-12)
            better = found > best
            best = mx.maximum(found, best)
            codes = mx.where(better, other, codes)
            estimate = mx.where(better, value, estimate)
            along = mx.where(better, inner, along)
        return codes, estimate, along


def split_channels(dim: int, bits: float) -> tuple[tuple[int, int, int], ...]:
    """The channels' widths: whole bits, or the first share with one bit more than the rest."""
    low = int(np.floor(bits))
    share = (bits - low) * dim
    if dim % _UNIT:
        raise KvError(f"a head of {dim} channels: turboquant packs multiples of {_UNIT}")
    if not 1 <= bits <= 8:
        raise KvError(f"{bits} bits: turboquant has 1 to 8")
    if share == 0:
        return ((0, dim, low),)
    if share % _UNIT:
        exact = ", ".join(f"{low + k * _UNIT / dim:g}" for k in range(1, dim // _UNIT))
        raise KvError(f"{bits} bits do not split {dim} channels in units of {_UNIT}; {exact} do")
    return ((0, int(share), low + 1), (int(share), dim, low))


@dataclass(frozen=True)
class _Grid:
    """A codebook with what finds the nearest centroid without comparing all."""

    bits: int
    levels: tuple[float, ...]

    @cached_property
    def centers(self) -> Any:
        import mlx.core as mx

        return mx.array(np.array(self.levels, np.float32))

    @cached_property
    def _table(self) -> tuple[Any, Any, float, float]:
        """Bins narrower than any cell, so that at most one border lies in each."""
        import mlx.core as mx

        levels = np.array(self.levels, np.float32)
        borders = (levels[:-1] + levels[1:]) / 2
        narrow = float(np.diff(borders).min()) if len(borders) > 1 else 1.0
        low, high = float(borders[0]) - narrow, float(borders[-1]) + narrow
        count = int(np.ceil((high - low) / (0.9 * narrow))) + 1
        width = (high - low) / count
        edges = low + width * np.arange(count)
        # A hair lower than the edge, so that rounding of the bin's number cannot skip a border.
        first = np.searchsorted(borders, edges - 0.01 * width).astype(np.uint32)
        ends = np.append(borders, np.inf).astype(np.float32)
        return mx.array(first), mx.array(ends), low, 1.0 / width

    def nearest(self, x: Any) -> Any:
        """Number of the nearest centroid, uint32."""
        import mlx.core as mx

        first, ends, low, per_unit = self._table
        place = mx.clip(mx.floor((x - low) * per_unit), 0, first.size - 1).astype(mx.uint32)
        code = first[place]
        return code + (x > ends[code]).astype(mx.uint32)


@cache
def _grid(dim: int, bits: int) -> _Grid:
    return _Grid(bits, codebook(dim, bits))


_AT_ONCE: Final = {1: 8, 2: 4, 3: 4, 4: 2, 6: 2, 8: 2}
"""Codes that one look-up turns into centroids: whole bytes, or twelve bits."""


@cache
def _table(dim: int, bits: int) -> Any:
    """The centroids of every combination of codes, in one row each."""
    import mlx.core as mx

    levels = np.array(codebook(dim, bits), np.float32)
    count = _AT_ONCE[bits]
    rows = np.arange(1 << (bits * count))[:, None] >> (bits * np.arange(count))
    table = mx.array(levels[rows & ((1 << bits) - 1)])
    # Two centroids are one 64-bit element, which is looked up faster than a row of two.
    return mx.view(table, mx.int64).reshape(-1) if count == 2 else table


def _lookup(words: mx.array, bits: int, count: int, dim: int) -> mx.array:
    """Packed codes -> centroids [..., count], several codes at a time."""
    import mlx.core as mx

    if bits not in _AT_ONCE:
        codes = unpack(words, bits, count).astype(mx.uint32)
        return mx.take(_grid(dim, bits).centers, codes)
    width = bits * _AT_ONCE[bits]
    index = mx.view(words, mx.uint16 if width == 16 else mx.uint8)
    if width == 12:
        index = _twelve_bits(index)
    if _AT_ONCE[bits] == 2:
        found = mx.view(mx.take(_table(dim, bits), index), mx.float32)
    else:
        found = mx.take(_table(dim, bits), index, axis=0)
    return found.reshape(*words.shape[:-1], count)


def _twelve_bits(octets: mx.array) -> mx.array:
    """Every three bytes as two numbers of twelve bits, the lower first."""
    import mlx.core as mx

    three = octets.reshape(*octets.shape[:-1], -1, 3).astype(mx.uint16)
    low = three[..., 0] | ((three[..., 1] & 15) << 8)
    high = (three[..., 1] >> 4) | (three[..., 2] << 4)
    return mx.stack([low, high], axis=-1).reshape(*octets.shape[:-1], -1)
