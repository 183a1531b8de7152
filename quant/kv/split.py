"""How a tensor's bits are spent best: on codes, on channels kept aside, on norms."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.aside import Aside
from quant.kv.codebook import distortion
from quant.kv.codes import STEPS, UNIT
from quant.kv.spec import TensorSpec

TRIES: Final = 5
_MOST: Final = 8
"""Channels of a head that are kept aside at most."""
_WORTH: Final = 0.9
"""Channels are kept aside where they lower the error to this share of itself, or less."""
_ROOM: Final = 8.0
"""How many times the largest norm that was seen still fits norms of 8 bits."""
_SHORT_ERROR: Final = (log(2) / STEPS) ** 2 / 6
"""Squared relative error of norms of 8 bits, which are rounded up or down by chance."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is stored beside the codes of a tensor's vectors of ``dim`` channels.

    ``aside`` as in TensorSpec; ``top`` the norm up to which 8 bits serve, 0 where none was seen.
    """

    dim: int
    aside: Aside = ()
    top: float = 0.0

    def tensor(self, bits: float) -> TensorSpec:
        """TurboQuant with codes of ``bits`` on average, and the norms that are best beside them."""
        top = self.top if self.is_short(bits) else 0.0
        return TensorSpec(scheme="turboquant", bits=bits, tries=TRIES, aside=self.aside, top=top)

    def is_short(self, bits: float) -> bool:
        """Whether norms of 8 bits lose less than the 8 bits gain that go to codes instead."""
        if not self.top or bits + UNIT / self.dim > 8:
            return False
        gained = distortion(self.dim, bits) - distortion(self.dim, bits + UNIT / self.dim)
        return gained > _SHORT_ERROR

    def price(self, bits: float) -> float:
        """Stored bits of a vector."""
        beside = 16 * len(self.aside[0]) if self.aside else 0
        return bits * self.dim + (8 if self.is_short(bits) else 16) + beside

    def error(self, bits: float) -> float:
        """Expected squared error of what is encoded, relative to its own square."""
        return distortion(self.dim, bits) + (_SHORT_ERROR if self.is_short(bits) else 0.0)

    def widest(self, price: float) -> float:
        """The most bits for codes, in units of eight channels, at ``price`` or less; 0 for none."""
        units = [units * UNIT / self.dim for units in range(self.dim, 0, -1)]
        return next((bits for bits in units if self.price(bits) <= price + 1e-6), 0.0)


def layout(x: NDArray[np.float32], bits: float) -> Layout:
    """The best layout of vectors like ``x`` [heads, tokens, dim], as they will be encoded.

    ``bits`` are what a channel costs besides a norm of 16 bits: as many bytes are spent whatever
    is chosen. A channel aside costs 16 of a vector's bits and takes its energy from what the codes
    have to hold.
    """
    dim = x.shape[-1]
    energy = (x.astype(np.float64) ** 2).mean(axis=1)
    order = np.argsort(-energy, axis=-1)
    best, least = Layout(dim=dim), np.inf
    for count in range(min(_MOST, dim // 4) + 1):
        places = np.sort(order[:, :count], axis=-1)
        rest = x.copy()
        np.put_along_axis(rest, places[:, None, :], 0.0, axis=-1)
        top = _ROOM * float(np.linalg.norm(rest, axis=-1).max())
        aside = tuple(tuple(int(place) for place in row) for row in places) if count else ()
        one = Layout(dim=dim, aside=aside, top=top)
        width = one.widest(bits * dim + 16)
        if not width:
            break
        left = energy.sum() - np.take_along_axis(energy, places, axis=-1).sum()
        error = float(left) * one.error(width)
        if error < least * (_WORTH if not best.aside else 1.0):
            best, least = one, error
    return best
