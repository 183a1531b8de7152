"""Codebooks as arrays: the nearest centroid of many numbers, and the centroids of packed codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from quant.kv.codebook import MAX_BITS, codebook
from quant.kv.codes import fields

if TYPE_CHECKING:
    import mlx.core as mx

_COMPARED: Final = 8
"""Up to so many magnitudes are told apart by comparing with every border."""
_FINE: Final = 32
"""Bins in the narrowest cell, where a table tells them apart: at borders either of two centroids
is as good, so that this costs a thousandth of the error."""
_STEPS: Final = 32767


@dataclass(frozen=True)
class Grid:
    """The ``2 ** bits`` centroids of :func:`codebook`, which are symmetric about zero."""

    dim: int
    bits: int

    @cached_property
    def _levels(self) -> Any:
        """Positive centroids, ascending, as :func:`centroids` gives them, so that norms fit."""
        levels = np.array(codebook(self.dim, self.bits))[1 << (self.bits - 1) :]
        step = unit_step(self.dim)
        return np.rint(levels / step) * step

    @cached_property
    def _borders(self) -> list[float]:
        return [float(border) for border in (self._levels[:-1] + self._levels[1:]) / 2]

    @property
    def only(self) -> float | None:
        """The magnitude of every centroid, where there is one."""
        return float(self._levels[0]) if self.bits == 1 else None

    def steps(self, size: mx.array) -> mx.array:
        """Of non-negative numbers, which magnitude is nearest: uint8."""
        import mlx.core as mx

        if len(self._levels) > _COMPARED:
            return mx.take(self._bins[0], self._bin(size))
        found = mx.zeros(size.shape, dtype=mx.uint8)
        for border in self._borders:
            found = found + mx.view(size > border, mx.uint8)
        return found

    def sizes(self, steps: mx.array) -> mx.array:
        """The magnitudes themselves, float32."""
        import mlx.core as mx

        if len(self._levels) > _COMPARED:
            return mx.take(self._array, steps)
        # Through as many points as there are, the polynomial is exact, and faster than a table.
        place = steps.astype(mx.float32) * self._spread - 1.0
        first, *others = self._powers
        found = mx.full(steps.shape, first)
        for power in others:
            found = found * place + power
        return found

    def nearest_sizes(self, size: mx.array) -> mx.array:
        """The magnitude nearest to each non-negative number."""
        import mlx.core as mx

        if len(self._levels) > _COMPARED:
            return mx.take(self._bins[1], self._bin(size))
        return self.sizes(self.steps(size))

    def codes(self, x: mx.array, steps: mx.array) -> mx.array:
        """Numbers of centroids, uint8, from numbers and what :meth:`steps` has of their sizes."""
        import mlx.core as mx

        half = len(self._levels)
        upper = mx.view(x >= 0, mx.uint8)
        return (steps ^ ((1 - upper) * (half - 1))) + upper * half

    @property
    def _spread(self) -> float:
        return 2.0 / max(len(self._levels) - 1, 1)

    @cached_property
    def _array(self) -> Any:
        import mlx.core as mx

        return mx.array(self._levels.astype(np.float32))

    @cached_property
    def _powers(self) -> list[float]:
        """Coefficients, the highest first, of the polynomial over [-1, 1] through the levels."""
        places = np.arange(len(self._levels)) * self._spread - 1.0
        found = np.linalg.solve(np.vander(places), self._levels)
        return [float(power) for power in found]

    @cached_property
    def _bins(self) -> tuple[Any, Any, float]:
        """Steps and magnitudes of narrow bins from zero on, and how many there are to a unit."""
        import mlx.core as mx

        borders = np.array(self._borders)
        narrow = float(np.diff(borders).min()) / _FINE
        middles = (np.arange(int(borders[-1] / narrow) + 2) + 0.5) * narrow
        steps = np.searchsorted(borders, middles)
        sizes = self._levels[steps].astype(np.float32)
        return mx.array(steps.astype(np.uint8)), mx.array(sizes), 1.0 / narrow

    def _bin(self, size: mx.array) -> mx.array:
        import mlx.core as mx

        steps, _, per_unit = self._bins
        return mx.minimum(size * per_unit, float(steps.size - 1)).astype(mx.uint16)


@cache
def grid(dim: int, bits: int) -> Grid:
    """The grid of ``bits``, made once."""
    return Grid(dim, bits)


_AT_ONCE: Final = {1: 8, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2}
"""Codes that one look-up turns into centroids."""


def unit_step(dim: int) -> float:
    """What the whole numbers of :func:`centroids` are multiples of.

    A 16th of a thousandth of a typical coordinate: less than a ten-thousandth of the error of
    eight bits.
    """
    return codebook(dim, MAX_BITS)[-1] / _STEPS


def centroids(octets: mx.array, bits: int, count: int, dim: int) -> mx.array:
    """Packed codes -> centroids [..., count] in steps of :func:`unit_step`, int16.

    Several codes at a time, whose centroids are one element of a table: looking up takes the time,
    whatever an element's width.
    """
    import mlx.core as mx

    index = fields(octets, bits * _AT_ONCE[bits])
    if _AT_ONCE[bits] == 8:
        found = mx.take(_table(dim, bits), index, axis=0)
    else:
        found = mx.view(mx.take(_table(dim, bits), index), mx.int16)
    return found.reshape(*octets.shape[:-1], count)


@cache
def _table(dim: int, bits: int) -> Any:
    """The centroids of every combination of codes."""
    import mlx.core as mx

    steps = np.rint(np.array(codebook(dim, bits)) / unit_step(dim)).astype(np.int16)
    count = _AT_ONCE[bits]
    rows = np.arange(1 << (bits * count))[:, None] >> (bits * np.arange(count))
    table = np.ascontiguousarray(steps[rows & ((1 << bits) - 1)])
    if count == 8:
        return mx.array(table)
    return mx.array(table.view(np.int32 if count == 2 else np.int64).reshape(-1))
