"""TurboQuant: rotate, then store each coordinate at the nearest centroid of its distribution.

arXiv 2504.19874. Departures, each measured: the norm that is stored makes vectors unbiased, where
the paper stores their own; it takes one byte where that is as good; massive channels are kept
aside; a few scales are tried per vector when it is encoded; and the 1-bit stage of the residual
(:mod:`quant.kv.prod`) is there for comparison only, because it loses to one more bit of the first
stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from quant.kv.basis import Aside, Basis, channels, orthonormal, rest
from quant.kv.codebook import distortion, gain
from quant.kv.codec import Packed
from quant.kv.codes import (
    UNIT,
    pack,
    pack_norms,
    pack_short_norms,
    unpack_norms,
    unpack_short_norms,
)
from quant.kv.grid import Grid, centroids, grid, unit_step
from quant.kv.learned import Learned
from quant.kv.rotation import Rotation

if TYPE_CHECKING:
    import mlx.core as mx

Norm = Literal["own", "unbiased", "least"]
_HALF_MAX: Final = 65504.0
_ZERO: Final[Any] = 0.0
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
    encoded. ``learned``: a basis in place of the rotation, and ``widths`` the whole bits of each of
    its units of eight coordinates, whose mean ``bits`` are. Those are as short as is best in sums
    of vectors of that ``coherence`` (:func:`quant.kv.codebook.gain`), which is unbiased where it is
    large. ``top``: 0 for norms of 16 bits, else the largest norm of 8 bits, which are steps of a
    32nd of an octave. KvError where the width does not divide or the bits are out of range.
    """

    dim: int
    bits: float
    rotation: Rotation
    norm: Norm = "unbiased"
    tries: int = 1
    aside: Aside = ()
    top: float = 0.0
    learned: Learned | None = None
    widths: tuple[int, ...] = ()
    coherence: float = 1.0
    segments: tuple[tuple[int, int, int], ...] = field(init=False)
    """(first channel, one past the last, bits)"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", _segments(self))
        if self.aside:
            _check_aside(self.aside, self.dim)
        if self.learned and self.learned.rows.shape[-1] != self.dim:
            raise KvError(
                f"a basis of {self.learned.rows.shape[-1]} channels for heads of {self.dim}"
            )

    @cached_property
    def bases(self) -> tuple[Basis | None, ...]:
        """The rotated basis, and that of the channels aside or of the mean where there are any."""
        if self.learned is not None:
            mean, basis = self.learned.mean, self._lengthened(self.learned.basis)
            return (basis, mean) if mean else (basis,)
        turn = self.rotation.turn
        if not self.aside:
            return (orthonormal(turn),)
        return rest(turn, self.aside, self.dim), channels(self.aside, self.dim)

    def _lengthened(self, basis: Basis) -> Basis:
        """``basis`` whose coordinates are as much longer as their width makes them short.

        In ``out``, so that unpacking does not know of it.
        """
        import mlx.core as mx

        gains = [self._gain(bits) for start, end, bits in self.segments for _ in range(start, end)]
        return Basis(basis.into, basis.out * mx.array(gains)[:, None])

    def _gain(self, bits: int) -> float:
        return gain(self.dim, bits, self.coherence) if self.widths else 1.0

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
        if self._mean is not None:
            x = x - self._mean
        y, *beside = (basis.forward(x) for basis in self.bases if basis and basis.into is not None)
        size = mx.linalg.norm(y, axis=-1, keepdims=True)
        unit = y * (1.0 / mx.maximum(size, 1e-30))
        parts = [
            _Part(grid(self.dim, bits), unit[..., start:end], self._weight(bits), self._gain(bits))
            for start, end, bits in self.segments
            if bits
        ]
        scale = self._best_scale(parts)
        packed, along, energy = [], _ZERO, _ZERO
        for part in parts:
            codes, inner, square = part.coded(scale)
            packed.append(pack(codes, part.grid.bits))
            along, energy = along + inner, energy + square
        if self.norm == "unbiased":
            due = sum((part.due for part in parts), _ZERO) if self.widths else 1.0
            size = size * due / mx.maximum(along, 1e-6)
        elif self.norm == "least":
            size = size * along / mx.maximum(energy, 1e-12)
        aside = (mx.clip(part, -_HALF_MAX, _HALF_MAX).astype(mx.float16) for part in beside)
        return (*packed, self._norms(size, unit), *aside)

    @property
    def _mean(self) -> Any:
        """[heads, 1, dim], or None."""
        mean = self.learned and self.learned.mean
        return mean.out if mean else None

    def _weight(self, bits: int) -> float:
        """What an error costs that much more than in coordinates of no bits, as they are chosen."""
        return 1.0 / distortion(self.dim, bits) if self.widths else 1.0

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
            centroids(octets, bits, end - start, self.dim)
            for octets, (start, end, bits) in zip(packed, coded, strict=False)
        ]
        sizes = packed[len(coded)]
        empty = self.dim - sum(end - start for start, end, _ in coded)
        if empty:
            parts.append(mx.zeros((*sizes.shape[:-1], empty), dtype=mx.int16))
        whole = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        norms = unpack_short_norms(sizes, self.top) if self.top else unpack_norms(sizes)
        found = whole.astype(mx.float32) * (norms * unit_step(self.dim))
        if self._mean is not None:
            return found, mx.ones(sizes.shape)
        return (found, *(part.astype(mx.float32) for part in packed[len(coded) + 1 :]))

    def _best_scale(self, parts: Sequence[_Part]) -> mx.array | None:
        """Of a few scales [..., 1] that whose codes' direction is nearest: least error at any norm.

        None where all are as good.
        """
        import mlx.core as mx

        widest = max(part.grid.bits for part in parts)
        if self.tries == 1 or widest == 1:
            return None
        reach = _SPREAD[widest]
        best: Any = None
        for scale in np.linspace(1.0 - reach, 1.0 + reach, self.tries):
            along, energy = _ZERO, _ZERO
            for part in parts:
                inner, square = part.judged(float(scale))
                along, energy = along + inner, energy + square
            found = along**2 / mx.maximum(energy, 1e-12)
            if best is None:
                best, chosen = found, mx.full(found.shape, float(scale))
            else:
                chosen = mx.where(found > best, float(scale), chosen)
                best = mx.maximum(found, best)
        return chosen


class _Part:
    """Coordinates [..., count] of one width, of vectors of norm about one."""

    def __init__(self, grid: Grid, unit: mx.array, weight: float, gain: float) -> None:
        import mlx.core as mx

        self.grid = grid
        self.unit = unit
        self.size = mx.abs(unit)
        self._weights = mx.full((unit.shape[-1], 1), weight)
        self._gain = gain
        self._square = weight * unit.shape[-1] * (gain * (grid.only or 0.0)) ** 2

    def judged(self, scale: float) -> tuple[Any, Any]:
        """Inner product [..., 1] with the centroids nearest to the ``scale``-fold, and theirs with
        themselves, both weighted.
        """
        only = self.grid.only
        if only is not None:
            return only * self._total, self._square
        value = self._gain * self.grid.nearest_sizes(self.size * scale)
        return (value * self.size) @ self._weights, (value * value) @ self._weights

    def coded(self, scale: mx.array | None) -> tuple[mx.array, Any, Any]:
        """Codes, uint8, and both inner products as above, at one scale a vector."""
        steps = self.grid.steps(self.size if scale is None else self.size * scale)
        codes = self.grid.codes(self.unit, steps)
        only = self.grid.only
        if only is not None:
            return codes, only * self._total, self._square
        value = self._gain * self.grid.sizes(steps)
        return codes, (value * self.size) @ self._weights, (value * value) @ self._weights

    @property
    def due(self) -> Any:
        """The weighted inner product [..., 1] that such coordinates have with their codes on
        average, which what is independent about those neither adds to nor takes from.
        """
        kept = self._gain * (1.0 - distortion(self.grid.dim, self.grid.bits))
        return kept * ((self.size * self.size) @ self._weights)

    @cached_property
    def _total(self) -> Any:
        return self._gain * (self.size @ self._weights)


def _segments(codec: TurboCodec) -> tuple[tuple[int, int, int], ...]:
    """Runs of one width: of the units of a learned basis, or of a rotation's channels."""
    if not codec.widths:
        return split_channels(codec.dim, codec.bits)
    if len(codec.widths) * UNIT != codec.dim or list(codec.widths) != sorted(codec.widths)[::-1]:
        raise KvError(
            f"widths {list(codec.widths)} of {codec.dim} channels: one for each "
            f"{UNIT}, never ascending"
        )
    ends = accumulate(len(list(same)) * UNIT for _, same in groupby(codec.widths))
    starts = (0, *ends)
    return tuple(
        (start, end, bits)
        for (start, end), bits in zip(pairwise(starts), dict.fromkeys(codec.widths), strict=True)
    )


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
