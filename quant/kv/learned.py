"""Bases learned from a text: few bits along the directions in which a head's vectors hardly lie.

Along the eigenvectors of their mean outer product coordinates are uncorrelated, and bits go where
the eigenvalues are: the Karhunen-Loeve transform and reverse water-filling (Cover and Thomas,
Elements of Information Theory, 10.3.3). A rotation drawn at random makes all coordinates alike and
has nothing to gain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.basis import Basis
from quant.kv.codebook import MAX_BITS, distortion
from quant.kv.codes import UNIT

_RIDGE: Final = 0.01
"""Share of the mean eigenvalue that is added to all: what a text did not show may still come."""


@dataclass(frozen=True, eq=False)
class Learned:
    """``rows`` [heads, dim + 1, dim]: coordinates, all of the same variance, times all rows but the
    last are vectors less their mean, which is the last.

    Coordinates that matter come first. Their scale means nothing: every vector has a norm of its
    own. Values have a mean so that what codes of few bits shorten is not what attention to many
    tokens leaves of them.
    """

    rows: NDArray[np.float16]

    @property
    def out(self) -> NDArray[np.float16]:
        """Without the mean."""
        return self.rows[:, :-1]

    @cached_property
    def name(self) -> str:
        """SHA-256 of the shape and the numbers, by which settings call it."""
        head = ",".join(map(str, self.rows.shape))
        return hashlib.sha256(head.encode() + self.rows.astype("<f2").tobytes()).hexdigest()

    @cached_property
    def basis(self) -> Basis:
        """As arrays, the inverse taken in float64."""
        import mlx.core as mx

        return Basis(mx.array(self.into), mx.array(self.out.astype(np.float32)))

    @cached_property
    def mean(self) -> Basis | None:
        """The mean: what one more coordinate, 1 of every vector, is along. None for none."""
        import mlx.core as mx

        mean = self.rows[:, -1:].astype(np.float32)
        return Basis(None, mx.array(mean)) if mean.any() else None

    @property
    def into(self) -> NDArray[np.float32]:
        """Vectors times it are coordinates."""
        into: NDArray[np.float32] = np.linalg.inv(self.out.astype(np.float64)).astype(np.float32)
        return into


def learn(
    spread: NDArray[np.float64], mean: NDArray[np.float64] | None = None
) -> tuple[Learned, tuple[float, ...]]:
    """The basis of mean outer products [heads, dim, dim], and the squares in each unit of it.

    ``mean`` [heads, dim] was taken off before.

    Units are eight coordinates of like eigenvalues, mixed so that each is as Gaussian as a rotated
    one. Their squares are means over heads and coordinates, descending.
    """
    dim = spread.shape[-1]
    size = np.trace(spread, axis1=-2, axis2=-1)[:, None, None] / dim
    square, turn = np.linalg.eigh(spread + np.maximum(size, 1e-30) * _RIDGE * np.eye(dim))
    square, turn = square[:, ::-1], turn[..., ::-1]
    out = np.sqrt(square)[..., None] * turn.swapaxes(-1, -2)
    out = (_mixing() @ out.reshape(-1, UNIT, dim)).reshape(out.shape)
    out /= np.abs(out).max(axis=(-1, -2), keepdims=True)
    squares = square.mean(axis=0).reshape(-1, UNIT).mean(axis=-1)
    last = np.zeros_like(out[:, :1]) if mean is None else mean[:, None]
    rows = np.concatenate([out, last], axis=1).astype(np.float16)
    return Learned(rows), tuple(float(one) for one in squares)


def shared_out(squares: tuple[float, ...], dim: int, total: int) -> tuple[int, ...]:
    """Whole bits by unit, ``total`` in sum, with the least expected error; never ascending.

    The error of a code is convex in its bits, so that taking the best bit each time is optimal.
    """
    falls = [distortion(dim, bits) - distortion(dim, bits + 1) for bits in range(MAX_BITS)]
    steps = sorted(
        ((square * fall, -unit) for unit, square in enumerate(squares) for fall in falls),
        reverse=True,
    )
    widths = [0] * len(squares)
    for _, unit in steps[:total]:
        widths[-unit] += 1
    return tuple(sorted(widths, reverse=True))


def write(path: Path, bases: Mapping[str, Learned]) -> None:
    """Keep bases in a file of numpy's (.npz), by name."""
    arrays: dict[str, Any] = {name: bases[name].rows for name in sorted(bases)}
    np.savez(path, **arrays)


def read(path: Path) -> dict[str, Learned]:
    """Bases by name; ValueError where one is not what it is called."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: Learned(file[name].astype(np.float16)) for name in file.files}
    for name, one in found.items():
        if one.name != name:
            raise ValueError(f"{path}: basis {name[:12]} is damaged: its hash differs")
    return found


def _mixing() -> NDArray[np.float64]:
    """A rotation [8, 8] that spreads one coordinate over all."""
    draw = np.random.default_rng(UNIT)
    return np.linalg.qr(draw.standard_normal((UNIT, UNIT)))[0]
