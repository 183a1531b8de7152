"""TurboQuant: rotate, then store each coordinate at the nearest centroid of its distribution.

arXiv 2504.19874. Departures, each measured: the norm that is stored makes vectors unbiased, where
the paper stores their own; it takes one byte where that is as good; massive channels are kept
aside; a few scales are tried per vector when it is encoded; and the 1-bit stage of the residual
(:mod:`quant.kv.prod`) is there for comparison only, because it loses to one more bit of the first
stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from quant.kv.aside import Aside, Channels, Rest
from quant.kv.codebook import codebook
from quant.kv.codec import Basis, Packed
from quant.kv.codes import (
    UNIT,
    fields,
    pack,
    pack_norms,
    pack_short_norms,
    unpack_norms,
    unpack_short_norms,
)
from quant.kv.rotation import Rotation

if TYPE_CHECKING:
    import mlx.core as mx

Norm = Literal["own", "unbiased", "least"]
_HALF_MAX: Final = 65504.0
_SPREAD: Final = {1: 0.3, 2: 0.3, 3: 0.25, 4: 0.2, 5: 0.15, 6: 0.1, 7: 0.06, 8: 0.04}
"""How far from 1 the scales that are tried reach, by bits."""


class KvError(ValueError):
    """A cache cannot be stored as asked; the message says why and what can."""


@dataclass(frozen=True, kw_only=True)
class TurboCodec:
    """``bits`` per coordinate, whole or in part, and a norm of 16 or 8 bits per vector.

    A fraction is an honest split: that share of the channels, in units of eight, has one bit more.
    ``norm``: "own" stores the vector's norm; "unbiased" divides it by the inner product with the
    code, so that E<q, x^> = <q, x> over rotations; "least" stores the least-squares scale, which
    makes all vectors a little short: attention averages values, and what errors have in common
    stays.
    ``tries``: scales tried per vector when encoding; 1 takes the vector as it is.
    ``aside``: by head the channels that are stored in half precision, without which the rest is
    encoded. ``top``: 0 for norms of 16 bits, else the largest norm of 8 bits, which are steps of a
    32nd of an octave. KvError where the width does not divide or the bits are out of range.
    """

    dim: int
    bits: float
    rotation: Rotation
    norm: Norm = "unbiased"
    tries: int = 1
    aside: Aside = ()
    top: float = 0.0
    segments: tuple[tuple[int, int, int], ...] = field(init=False)
    """(first channel, one past the last, bits)"""
    bases: tuple[Basis | None, ...] = field(init=False)
    """The rotated basis, and that of the channels aside where there are any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", split_channels(self.dim, self.bits))
        bases: tuple[Basis, ...] = (self.rotation,)
        if self.aside:
            _check_aside(self.aside, self.dim)
            bases = (
                Rest(self.rotation, self.aside, self.dim),
                Channels(self.aside, self.dim),
            )
        object.__setattr__(self, "bases", bases)

    @property
    def effective_bits(self) -> float:
        """Bits per channel with the norm and the channels aside."""
        codes = sum((end - start) * bits for start, end, bits in self.segments)
        beside = 16 * len(self.aside[0]) if self.aside else 0
        return (codes + (8 if self.top else 16) + beside) / self.dim

    def encode(self, x: mx.array) -> Packed:
        """Vectors -> (bytes of each segment ..., norms [..., 1], channels aside [..., n]).

        Vectors are [..., dim], or [batch, heads, ..., dim] where channels are aside.
        """
        import mlx.core as mx

        x = x.astype(mx.float32)
        y, *rest = (basis.forward(x) for basis in self.bases if basis is not None)
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
        packed = [pack(codes[..., start:end], bits) for start, end, bits in self.segments if bits]
        beside = (mx.clip(part, -_HALF_MAX, _HALF_MAX).astype(mx.float16) for part in rest)
        return (*packed, self._norms(size, unit), *beside)

    def _norms(self, size: mx.array, unit: mx.array) -> mx.array:
        import mlx.core as mx

        if not self.top:
            return pack_norms(size)
        lift = None
        if self.norm == "unbiased":  # the far decimals of a coordinate are as good as random
            lift = mx.abs(unit[..., :1]) * 9973.0
            lift = lift - mx.floor(lift)
        return pack_short_norms(size, self.top, lift)

    def decode(self, packed: Packed) -> tuple[mx.array, ...]:
        """Packed arrays -> coordinates [..., dim] in the rotated basis, and the channels aside."""
        import mlx.core as mx

        coded = [segment for segment in self.segments if segment[2]]
        parts = [
            _lookup(octets, bits, end - start, self.dim)
            for octets, (start, end, bits) in zip(packed, coded, strict=False)
        ]
        sizes = packed[len(coded)]
        empty = self.dim - sum(end - start for start, end, _ in coded)
        if empty:
            parts.append(mx.zeros((*sizes.shape[:-1], empty)))
        unit = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        norms = unpack_short_norms(sizes, self.top) if self.top else unpack_norms(sizes)
        return (unit * norms, *(part.astype(mx.float32) for part in packed[len(coded) + 1 :]))

    def _nearest(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """Codes and their centroids, for vectors of norm about one."""
        import mlx.core as mx

        codes, values = [], []
        for start, end, bits in self.segments:
            if not bits:
                codes.append(mx.zeros_like(unit[..., start:end]).astype(mx.uint32))
                values.append(mx.zeros_like(unit[..., start:end]))
                continue
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
    """The channels' widths: whole bits, or the first share with one bit more than the rest.

    Of less than one bit the rest have none, and are zero.
    """
    total = bits * dim
    if dim % UNIT:
        raise KvError(f"a head of {dim} channels: turboquant packs multiples of {UNIT}")
    if not 0 < bits <= 8:
        raise KvError(f"{bits:g} bits: turboquant has more than 0 and up to 8")
    if abs(total / UNIT - round(total / UNIT)) > 1e-6:
        near = [int(total / UNIT) + more for more in (0, 1)]
        fit = " and ".join(f"{units * UNIT / dim:g}" for units in near if units)
        raise KvError(f"{bits:g} bits do not split {dim} channels in units of {UNIT}; {fit} do")
    low, share = divmod(round(total), dim)
    if share == 0:
        return ((0, dim, low),)
    return ((0, share, low + 1), (share, dim, low))


def _check_aside(aside: Aside, dim: int) -> None:
    """KvError where the heads' lists are no channels, or not as many in each head."""
    counts = {len(places) for places in aside}
    named = all(
        0 <= place < dim and places.count(place) == 1 for places in aside for place in places
    )
    if len(counts) > 1 or 0 in counts or not named:
        raise KvError(
            f"channels aside {[list(places) for places in aside]}: every head needs as many, each "
            f"once and below {dim}"
        )


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


_AT_ONCE: Final = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}
"""Codes that one look-up turns into centroids."""


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


def _lookup(octets: mx.array, bits: int, count: int, dim: int) -> mx.array:
    """Packed codes -> centroids [..., count], several codes at a time."""
    import mlx.core as mx

    index = fields(octets, bits * _AT_ONCE[bits])
    if _AT_ONCE[bits] == 2:
        found = mx.view(mx.take(_table(dim, bits), index), mx.float32)
    else:
        found = mx.take(_table(dim, bits), index, axis=0)
    return found.reshape(*octets.shape[:-1], count)
