"""Massive channels kept aside: in half precision beside the codes, which do without them.

A channel that holds most of a vector's energy sets the scale of all codes of the vector, whatever
the rotation. The channels are those of a head and do not depend on the token, as in key biases;
:mod:`quant.kv.split` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.kv.codec import Basis

if TYPE_CHECKING:
    import mlx.core as mx

Aside = tuple[tuple[int, ...], ...]
"""By head the channels kept aside, as many in each; one entry serves all heads; none: ()."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The basis of the channels aside: ``places`` of each head's ``dim``."""

    places: Aside
    dim: int

    def forward(self, x: mx.array) -> mx.array:
        """Vectors [batch, heads, ..., dim] -> those channels [batch, heads, ..., n]."""
        import mlx.core as mx

        at = _by_head(self._index, x)
        return mx.take_along_axis(x, mx.broadcast_to(at, (*x.shape[:-1], at.shape[-1])), axis=-1)

    def inverse(self, x: mx.array) -> mx.array:
        """Channels [batch, heads, ..., n] -> vectors, zero elsewhere."""
        import mlx.core as mx

        at = mx.broadcast_to(_by_head(self._index, x), x.shape)
        empty = mx.zeros((*x.shape[:-1], self.dim), dtype=x.dtype)
        return mx.put_along_axis(empty, at, x, axis=-1)

    @cached_property
    def _index(self) -> Any:
        import mlx.core as mx

        return mx.array(np.array(self.places, np.int32))


@dataclass(frozen=True, eq=False)
class Rest:
    """``basis`` on the other channels; those aside are zero on either side of it."""

    basis: Basis
    places: Aside
    dim: int

    def forward(self, x: mx.array) -> mx.array:
        """Vectors [batch, heads, ..., dim] -> coordinates of what is left of them."""
        return self.basis.forward(x * _by_head(self._kept, x).astype(x.dtype))

    def inverse(self, x: mx.array) -> mx.array:
        """Coordinates -> vectors, zero in the channels aside: errors there are not ours."""
        plain = self.basis.inverse(x)
        return plain * _by_head(self._kept, plain).astype(x.dtype)

    @cached_property
    def _kept(self) -> Any:
        import mlx.core as mx

        kept = np.ones((len(self.places), self.dim), np.float32)
        np.put_along_axis(kept, np.array(self.places, np.int64), 0.0, axis=-1)
        return mx.array(kept)


def _by_head(rows: mx.array, x: mx.array) -> mx.array:
    """[heads, *] so that it lies along the second axis of ``x``."""
    return rows.reshape(1, rows.shape[0], *(1,) * (x.ndim - 3), rows.shape[1])
