"""How a tensor's bits are spent best: on codes, on channels kept aside, on norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.basis import Aside
from quant.kv.codebook import distortion, remains
from quant.kv.codec import restored
from quant.kv.codes import STEPS, UNIT
from quant.kv.learned import Learned, learn, shared_out
from quant.kv.rotation import ROUNDS, Rotation
from quant.kv.spec import TensorSpec

TRIES: Final = 5
_MOST: Final = 8
"""Channels of a head that are kept aside at most."""
_WORTH: Final = 0.9
"""Channels are kept aside where they lower the error to this share of itself, or less."""
_WORTH_A_ROUND: Final = 0.97
"""One round of the transform serves where it lowers the error to this share, or less."""
_TRIED: Final = 64
"""Vectors of a head that are encoded to tell."""
_ROOM: Final = 8.0
"""How many times the largest norm that was seen still fits norms of 8 bits."""
_SHORT_ERROR: Final = (log(2) / STEPS) ** 2 / 6
"""Squared relative error of norms of 8 bits, which are rounded up or down by chance."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor's vectors of ``dim`` channels are stored but for the bits of their codes.

    ``aside``, ``rounds`` and ``basis`` as in TensorSpec; ``top`` the norm up to which 8 bits serve,
    0 where none was seen; ``squares`` the share of each unit of a learned basis, and ``coherence``
    again as in TensorSpec.
    """

    dim: int
    aside: Aside = ()
    top: float = 0.0
    rounds: int = ROUNDS
    basis: Learned | None = None
    squares: tuple[float, ...] = ()
    coherence: float = 1.0

    def tensor(self, bits: float) -> TensorSpec:
        """TurboQuant with codes of ``bits`` on average, and the norms that are best beside them."""
        return TensorSpec(
            scheme="turboquant",
            bits=bits,
            tries=TRIES,
            aside=self.aside,
            top=self.top if self.is_short(bits) else 0.0,
            rounds=self.rounds,
            basis=self.basis,
            widths=self._widths(bits) if self.basis else (),
            coherence=self.coherence,
        )

    def _widths(self, bits: float) -> tuple[int, ...]:
        units = round(bits * self.dim / UNIT)
        return shared_out(self.squares, self.dim, units, self.coherence)

    def _codes(self, bits: float) -> float:
        """Expected squared error of codes, relative to what is encoded."""
        if not self.basis:
            return distortion(self.dim, bits)
        left = (
            square * remains(self.dim, width, self.coherence)
            for square, width in zip(self.squares, self._widths(bits), strict=True)
        )
        return sum(left) / sum(self.squares)

    def is_short(self, bits: float) -> bool:
        """Whether norms of 8 bits lose less than the 8 bits gain that go to codes instead."""
        if not self.top or bits + UNIT / self.dim > 8:
            return False
        gained = self._codes(bits) - self._codes(bits + UNIT / self.dim)
        return gained > _SHORT_ERROR

    def price(self, bits: float) -> float:
        """Stored bits of a vector."""
        beside = 16 * len(self.aside[0]) if self.aside else 0
        return bits * self.dim + (8 if self.is_short(bits) else 16) + beside

    def error(self, bits: float) -> float:
        """Expected squared error of what is encoded, relative to its own square."""
        return self._codes(bits) + (_SHORT_ERROR if self.is_short(bits) else 0.0)

    def widest(self, price: float) -> float:
        """The most bits for codes, in units of eight channels, at ``price`` or less; 0 for none."""
        units = [units * UNIT / self.dim for units in range(self.dim, 0, -1)]
        return next((bits for bits in units if self.price(bits) <= price + 1e-6), 0.0)


def layout(x: NDArray[np.float32], bits: float, rotation: Rotation) -> Layout:
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
    return _rounds(best, x, best.widest(bits * dim + 16), rotation)


def _rounds(one: Layout, x: NDArray[np.float32], bits: float, rotation: Rotation) -> Layout:
    """With one round of the transform, where that serves such vectors clearly better.

    It leaves a vector of one massive channel with coordinates of one size, which few bits hold
    well; which channel it is may change from vector to vector. Others it leaves as they are after
    more rounds, or worse. Told by encoding some of the vectors both ways.
    """
    import mlx.core as mx

    if not bits or rotation.signs is None:
        return one
    step = max(1, x.shape[1] // _TRIED)
    some = mx.array(x[:, ::step])[None]
    errors = {}
    for rounds in (ROUNDS, 1):
        found = replace(one, rounds=rounds)
        codec = found.tensor(bits).codec(one.dim, rotation)
        errors[rounds] = float(((restored(codec, codec.encode(some)) - some) ** 2).sum())
    return replace(one, rounds=1) if errors[1] < _WORTH_A_ROUND * errors[ROUNDS] else one


def learned_layout(
    x: NDArray[np.float32],
    spread: NDArray[np.float64],
    mean: NDArray[np.float64] | None = None,
    cost: NDArray[np.float64] | None = None,
) -> Layout:
    """A basis learned from what is known of vectors like ``x``; arguments as in :func:`learn`."""
    basis, squares = learn(spread, mean, cost)
    x = x - basis.rows[:, -1:].astype(np.float32)
    top = _ROOM * float(np.linalg.norm(x @ basis.into, axis=-1).max())
    return Layout(dim=x.shape[-1], top=top, basis=basis, squares=squares)
