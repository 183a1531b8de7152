"""Coordinates of a head's vectors: what a scheme stores, and what attention computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mlx.core as mx

Aside = tuple[tuple[int, ...], ...]
"""By head the channels kept aside, as many in each; one entry serves all heads; none: ()."""


@dataclass(frozen=True, eq=False)
class Basis:
    """``into`` [heads or 1, dim, n] gives coordinates of vectors, ``out`` [heads or 1, n, dim] the
    vectors of coordinates. Where ``out`` is not the transpose of ``into``, queries have other
    coordinates than keys: :meth:`dual`. ``into`` is None where coordinates need no vectors.
    """

    into: Any
    out: Any

    def forward(self, x: mx.array) -> mx.array:
        """Vectors [batch, heads, ..., dim] -> coordinates [batch, heads, ..., n]."""
        found: mx.array = x @ _by_head(self.into, x)
        return found

    def inverse(self, x: mx.array) -> mx.array:
        """Coordinates -> vectors."""
        found: mx.array = x @ _by_head(self.out, x)
        return found

    def dual(self, x: mx.array) -> mx.array:
        """Vectors -> what has the same inner products with coordinates as they with vectors."""
        found: mx.array = x @ _by_head(self.out.swapaxes(-1, -2), x)
        return found


def orthonormal(matrix: Any) -> Basis:
    """The basis of a matrix [dim, n] or [heads, dim, n] whose columns are orthonormal."""
    into = matrix[None] if matrix.ndim == 2 else matrix
    return Basis(into, into.swapaxes(-1, -2))


def channels(places: Aside, dim: int) -> Basis:
    """The channels ``places`` of each head's ``dim``, as they are."""
    import mlx.core as mx

    return orthonormal(mx.array(_selection(places, dim)))


def rest(matrix: Any, places: Aside, dim: int) -> Basis:
    """``matrix`` on the other channels; those of ``places`` are zero on either side of it."""
    import mlx.core as mx

    kept = 1.0 - _selection(places, dim).sum(axis=-1, keepdims=True)
    return orthonormal(mx.array(kept) * matrix)


def _selection(places: Aside, dim: int) -> NDArray[np.float32]:
    """[heads, dim, n], a one where a channel is the nth of a head's."""
    found: NDArray[np.float32] = np.eye(dim, dtype=np.float32)[np.array(places)]
    return found.swapaxes(-1, -2)


def _by_head(matrix: mx.array, x: mx.array) -> mx.array:
    """[heads, *, *] so that heads lie along the second axis of ``x``."""
    if matrix.shape[0] == 1:
        return matrix[0]
    return matrix.reshape(matrix.shape[0], *(1,) * (x.ndim - 4), *matrix.shape[1:])
