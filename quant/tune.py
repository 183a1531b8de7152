"""Rounding and grid tuned down the gradient of a loss: SignRound, the method of AutoRound.

Cheng et al., arXiv 2309.05516. Every element has a place between the codes and rounds to the
nearest; places, scales and biases take steps of one size against the sign of their gradients,
which pass the rounding as if it were not there, and the steps shrink to nothing. AutoRound starts
where rounding to the nearest puts an element; this starts at codes that are given, such as GPTQ's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.packing import pack_rows, unpack_rows
from quant.recipe import QuantSpec

Array = npt.NDArray[Any]
Values = npt.NDArray[np.float32]

DEFAULT_ITERATIONS: Final = 200
_INSIDE: Final = np.float32(0.49)
"""How far a place may be from its code at the start, and beyond the last codes at any time."""
_SLICE: Final = 1 << 18
"""Elements that are stepped at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How many steps, on how many sequences each, and how far they go altogether."""

    iterations: int = DEFAULT_ITERATIONS
    sequences: int = 2
    reach: float = 0.5
    """Sum of the steps of a place, in codes."""
    grid_reach: float = 0.125
    """Sum of the steps of a scale or a bias, in scales as they were at the start."""

    def to_json(self) -> dict[str, Any]:
        """As plain data: all of it decides bytes."""
        return asdict(self)

    def share(self, step: int) -> float:
        """The share of the reach that ``step`` takes; linearly less, and 1 in sum."""
        return 2 * (self.iterations - step) / (self.iterations * (self.iterations + 1))

    def batch(self, step: int, count: int) -> list[int]:
        """The sequences out of ``count`` that ``step`` looks at: far apart, all as often."""
        size = min(self.sequences, count)
        stride = next(n for n in range(round(0.618 * count), 2 * count) if np.gcd(n, count) == 1)
        return [(step * size + i) * stride % count for i in range(size)]


class TunedMatrix:
    """One (rows, cols) matrix of affine codes in the course of tuning."""

    def __init__(self, w: Array, parts: dict[str, Array], spec: QuantSpec) -> None:
        """Start at the stored tensors ``parts`` of ``w``, whose dtype the grid is stored in."""
        assert spec.mode == "affine", "only integers lie evenly"
        self._spec = spec
        self._dtype = parts["scales"].dtype
        self._scales = parts["scales"].astype(np.float32)
        self._biases = parts["biases"].astype(np.float32)
        self._unit = np.abs(self._scales)
        self._places = np.empty(w.shape, np.float32)
        codes = unpack_rows(parts["weight"], spec.bits)
        for rows in self._slices():
            own = self._grouped(codes[rows].astype(np.float32))
            scale, bias = self._scales[rows, :, None], self._biases[rows, :, None]
            exact = self._grouped(w[rows].astype(np.float32)) - bias
            places = np.divide(exact, scale, out=own.copy(), where=scale != 0)
            self._grouped(self._places[rows])[:] = np.clip(places, own - _INSIDE, own + _INSIDE)

    def values(self, out: Values) -> None:
        """Fill ``out`` (rows, cols) with what the stored tensors stand for."""
        for rows in self._slices():
            scale, bias = (self._stored(grid[rows])[..., None] for grid in self._grids())
            found = self._grouped(out[rows])
            np.multiply(self._grouped(self._codes(rows)), scale, out=found)
            found += bias

    def step(self, gradient: Values, tuning: Tuning, number: int) -> None:
        """Take step ``number`` against ``gradient`` (rows, cols), that of the loss by the values.

        An element whose gradient is 0 stays where it is.
        """
        share = tuning.share(number)
        place = np.float32(share * tuning.reach)
        grid = np.float32(share * tuning.grid_reach)
        most = np.float32(2**self._spec.bits - 1) + _INSIDE
        for rows in self._slices():
            own = self._grouped(gradient[rows])
            codes = self._grouped(self._codes(rows))
            unit = grid * self._unit[rows]
            up = np.sign(self._scales[rows])[..., None]
            moved = self._grouped(self._places[rows])
            moved -= place * (np.sign(own) * up)
            np.clip(moved, -_INSIDE, most, out=moved)
            self._scales[rows] -= unit * np.sign((own * codes).sum(axis=-1))
            self._biases[rows] -= unit * np.sign(own.sum(axis=-1))

    def parts(self) -> dict[str, Array]:
        """The stored tensors."""
        scales, biases = (grid.astype(self._dtype) for grid in self._grids())
        codes = np.empty(self._places.shape, np.uint8)
        for rows in self._slices():
            codes[rows] = self._codes(rows)
        packed = pack_rows(codes, self._spec.bits)
        return {"weight": packed, "scales": scales, "biases": biases}

    def _codes(self, rows: slice) -> Values:
        levels = np.float32(2**self._spec.bits - 1)
        return np.clip(np.rint(self._places[rows]), np.float32(0), levels)

    def _grids(self) -> tuple[Values, Values]:
        return self._scales, self._biases

    def _stored(self, grid: Values) -> Values:
        return grid.astype(self._dtype).astype(np.float32)

    def _grouped(self, x: Values) -> Values:
        return x.reshape(len(x), -1, self._spec.group_size)

    def _slices(self) -> list[slice]:
        rows = len(self._places)
        step = max(1, _SLICE // self._places[0].size)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
