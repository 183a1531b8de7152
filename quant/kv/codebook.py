"""Lloyd-Max codebooks for one coordinate of a random unit vector, converged in float64."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_BITS: Final = 8
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_STEPS: Final = 200
_TOLERANCE: Final = 1e-13


@cache
def codebook(dim: int, bits: int) -> tuple[float, ...]:
    """The ``2**bits`` centroids, ascending, in units of a unit vector in ``dim`` dimensions.

    A coordinate x of a uniformly random unit vector has the density (1 - x^2)^((dim - 3) / 2)
    (arXiv 2504.19874, lemma 1). The centroids are the fixed point of Lloyd's iteration: each is the
    mean of its cell, each border is midway between two. Found by Newton's method, because Lloyd's
    own steps shrink with the square of the number of cells.
    ValueError for other than 1 to 8 bits or fewer than 4 dimensions.
    """
    if not 1 <= bits <= MAX_BITS or dim < 4:
        raise ValueError(f"no codebook of {bits} bits in {dim} dimensions: 1 to 8 bits, 4 or more")
    positive = _solve(dim, 1 << (bits - 1))
    return tuple(float(value) for value in np.concatenate([-positive[::-1], positive]))


def distortion(dim: int, bits: float) -> float:
    """Expected squared error of a unit vector of ``dim`` coordinates, each at its centroid.

    Of a fraction of a bit the share of coordinates with one bit more; with none, they are zero.
    """
    low = int(bits)
    share = bits - low
    mixed = (1.0 - share) * _distortion(dim, low)
    return mixed + share * _distortion(dim, low + 1) if share else mixed


def gain(dim: int, bits: int, coherence: float) -> float:
    """By how much centroids of ``bits`` had best be longer where sums of vectors are what counts.

    A coordinate's centroid is (1 - D) x on average, and an error of its own, of variance D (1 - D)
    where x has 1. In sums over vectors the first adds up as the vectors do, the second as what is
    independent: with L, the ``coherence``, for what the square of such a sum has over the sum of
    the squares, L (1 - g (1 - D))^2 + g^2 D (1 - D) is least at g = L / (L (1 - D) + D). That is 1
    for a vector by itself, L = 1, and 1 / (1 - D), which leaves no bias, for many that are alike.
    """
    error = distortion(dim, bits)
    return coherence / (coherence * (1.0 - error) + error)


def remains(dim: int, bits: int, coherence: float) -> float:
    """Expected squared error of sums of centroids with their :func:`gain`.

    Over the sum of the squares of what is summed: g D.
    """
    return distortion(dim, bits) * gain(dim, bits, coherence)


@cache
def _distortion(dim: int, bits: int) -> float:
    if bits == 0:
        return 1.0
    centers = np.array(codebook(dim, bits))[1 << (bits - 1) :]
    mass, first = _moments(_borders(centers), dim)
    total = float(mass.sum())
    # E x^2 = 1 / dim, and at the fixed point the error of a cell is E x^2 - E c^2.
    return 1.0 - dim * float((first * centers).sum()) / total


def _solve(dim: int, count: int) -> Array:
    """Positive centroids; the density is symmetric, so zero is a border."""
    spread = 1.0 / np.sqrt(dim)
    # Start from the point density that minimises the error of many cells: the density ^ (1/3).
    grid = np.linspace(0.0, min(1.0, 9.0 * spread), 20001)
    density = _density(grid, dim) ** (1.0 / 3.0)
    share = np.cumsum(density)
    centers: Array = np.asarray(
        np.interp((np.arange(count) + 0.5) / count, share / share[-1], grid), np.float64
    )
    for _ in range(_STEPS):
        borders = _borders(centers)
        mass, first = _moments(borders, dim)
        means = first / mass
        gap = means - centers
        if float(np.abs(gap).max()) < _TOLERANCE * spread:
            break
        step = _newton(centers, borders, mass, means, gap, dim)
        centers = np.asarray(centers + step, np.float64)
    return centers


def _newton(
    centers: Array, borders: Array, mass: Array, means: Array, gap: Array, dim: int
) -> Array:
    """The step that makes every centroid the mean of its cell, to first order.

    Moving a border moves the mean by density * (border - mean) / mass; it moves by half of what
    either neighbour does. Falls back to Lloyd's own step where it would leave the order.
    """
    count = len(centers)
    at = _density(borders, dim)
    upper = at[1:] * (borders[1:] - means) / mass / 2.0
    lower = at[:-1] * (means - borders[:-1]) / mass / 2.0
    upper[-1] = lower[0] = 0.0  # the outer borders stay
    jacobian = np.diag(upper + lower - 1.0)
    jacobian += np.diag(upper[:-1], 1) + np.diag(lower[1:], -1)
    step: Array = np.asarray(np.linalg.solve(jacobian, -gap) if count > 1 else gap, np.float64)
    moved = centers + step
    ordered = moved[0] > 0.0 and moved[-1] < 1.0 and bool(np.all(np.diff(moved) > 0.0))
    return step if ordered else gap


def _borders(centers: Array) -> Array:
    return np.concatenate([[0.0], (centers[:-1] + centers[1:]) / 2.0, [1.0]])


def _density(x: Array, dim: int) -> Array:
    result: Array = np.maximum(1.0 - x * x, 0.0) ** ((dim - 3) / 2.0)
    return result


def _moments(borders: Array, dim: int) -> tuple[Array, Array]:
    """Mass and first moment of each cell.

    The first moment has a closed form; the mass is integrated, the last cell up to where the
    density has fallen below any rounding.
    """
    low, high = borders[:-1], borders[1:].copy()
    high[-1] = min(1.0, max(high[-2] if len(high) > 1 else 0.0, low[-1]) + 9.0 / np.sqrt(dim))
    pieces = 8
    edges = low[:, None] + (high - low)[:, None] * np.arange(pieces + 1) / pieces
    half = (edges[:, 1:] - edges[:, :-1]) / 2.0
    middle = (edges[:, 1:] + edges[:, :-1]) / 2.0
    points = middle[..., None] + half[..., None] * _NODES
    mass = (_density(points, dim) @ _WEIGHTS * half).sum(axis=-1)
    power = (dim - 1) / 2.0
    tail = np.maximum(1.0 - borders * borders, 0.0) ** power / (dim - 1)
    first: Array = tail[:-1] - tail[1:]
    return mass, first
