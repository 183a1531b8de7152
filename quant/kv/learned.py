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
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.basis import Basis
from quant.kv.codebook import MAX_BITS, remains
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

    def __post_init__(self) -> None:
        shape = self.rows.shape
        if len(shape) != 3 or shape[1] != shape[2] + 1 or shape[2] % UNIT or not self.rows.size:
            raise ValueError(
                f"is {list(shape)}, not [heads, channels + 1, channels] of a multiple of {UNIT}"
            )
        if self.rows.dtype != np.float16 or not np.isfinite(self.rows).all():
            raise ValueError("holds other than finite numbers of half precision")

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
    spread: NDArray[np.float64],
    mean: NDArray[np.float64] | None = None,
    cost: NDArray[np.float64] | None = None,
) -> tuple[Learned, tuple[float, ...]]:
    """The basis of mean outer products [heads, dim, dim], and the squares in each unit of it.

    ``mean`` [heads, dim] was taken off before. ``cost`` [heads, dim, dim]: an error e costs
    e^T cost e; its square where there is none. Squares are of what errors cost: the eigenvectors
    are those of A spread A for A A = cost.

    Units are eight coordinates of like eigenvalues, mixed so that each is as Gaussian as a rotated
    one. Their squares are means over heads and coordinates, descending.
    """
    dim = spread.shape[-1]
    spread = _ridged(spread)
    if cost is None:
        root = back = np.broadcast_to(np.eye(dim), spread.shape)
    else:
        price, along = np.linalg.eigh(_ridged(cost))
        root, back = (
            (along * size[:, None]) @ along.swapaxes(-1, -2) for size in (price**0.5, price**-0.5)
        )
    square, turn = np.linalg.eigh(root @ spread @ root)
    square, turn = square[:, ::-1], turn[..., ::-1]
    out = np.sqrt(square)[..., None] * turn.swapaxes(-1, -2) @ back
    out = (_mixing() @ out.reshape(-1, UNIT, dim)).reshape(out.shape)
    out /= np.abs(out).max(axis=(-1, -2), keepdims=True)
    squares = square.mean(axis=0).reshape(-1, UNIT).mean(axis=-1)
    last = np.zeros_like(out[:, :1]) if mean is None else mean[:, None]
    rows = np.concatenate([out, last], axis=1).astype(np.float16)
    return Learned(rows), tuple(float(one) for one in squares)


def _ridged(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """With a little of their mean eigenvalue added to all."""
    dim = products.shape[-1]
    size = np.trace(products, axis1=-2, axis2=-1)[:, None, None] / dim
    found: NDArray[np.float64] = products + np.maximum(size, 1e-30) * _RIDGE * np.eye(dim)
    return found


@cache
def shared_out(
    squares: tuple[float, ...], dim: int, total: int, coherence: float
) -> tuple[int, ...]:
    """Whole bits by unit, ``total`` in sum, with the least expected error; never ascending.

    The error of a code is convex in its bits, so that taking the best bit each time is optimal.
    """
    errors = [remains(dim, bits, coherence) for bits in range(MAX_BITS + 1)]
    falls = [before - after for before, after in pairwise(errors)]
    steps = sorted(
        ((square * fall, -unit) for unit, square in enumerate(squares) for fall in falls),
        reverse=True,
    )
    widths = [0] * len(squares)
    for _, unit in steps[:total]:
        widths[-unit] += 1
    return tuple(sorted(widths, reverse=True))


def packed(bases: Mapping[str, Learned]) -> bytes:
    """A safetensors file of bases, by name."""
    from safetensors.numpy import save

    return bytes(save({name: bases[name].rows for name in sorted(bases)}))


def read(path: Path) -> dict[str, Learned]:
    """Bases by name; ValueError, naming the file, where one is none or not what it is called."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found = {}
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is no safetensors file: {error}") from error
    for name, rows in arrays.items():
        try:
            found[name] = Learned(rows)
        except ValueError as error:
            raise ValueError(f"{path}: basis {name[:12]}: {error}") from error
        if found[name].name != name:
            raise ValueError(f"{path}: basis {name[:12]} is damaged: its hash differs")
    return found


def _mixing() -> NDArray[np.float64]:
    """A rotation [8, 8] that spreads one coordinate over all."""
    draw = np.random.default_rng(UNIT)
    return np.linalg.qr(draw.standard_normal((UNIT, UNIT)))[0]
