"""What one run of a model put into its modules and got out of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["in", "out"]
Values = NDArray[np.float32]


@dataclass(slots=True)
class Trace:
    """Inputs and outputs of modules by path, in the order in which they were first seen.

    A module that runs for each token apart is one event that grows.
    """

    events: dict[tuple[str, Side], list[Any]] = field(default_factory=dict)

    def add(self, path: str, side: Side, value: Any) -> None:
        """Note what went into or came out of a call of ``path``."""
        self.events.setdefault((path, side), []).append(value)

    def __iter__(self) -> Iterator[tuple[str, Side]]:
        """The events in order."""
        return iter(self.events)

    def values(self, path: str, side: Side) -> tuple[Values, int | None] | None:
        """Values of all calls as one array, and the axis along which calls follow one another.

        Leading axes of size one are left out. The axis is None for a single call. None as a whole
        where the calls differ along more than one axis, or along none without being single tokens.
        """
        found = self.events.get((path, side))
        if not found:
            return None
        arrays = [np.asarray(value, np.float32) for value in found]
        if any(array.ndim == 0 for array in arrays):
            return None
        axis = None
        if len(arrays) > 1:
            shapes = {array.shape for array in arrays}
            if len({array.ndim for array in arrays}) > 1:
                return None
            varying = [
                n for n, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1
            ]
            if not varying and arrays[0].shape[-2:-1] == (1,):
                varying = [arrays[0].ndim - 2]  # single tokens from the first call on
            if len(varying) != 1:
                return None
            axis = varying[0]
            arrays = [np.concatenate(arrays, axis)]
        whole = arrays[0]
        while whole.ndim > 1 and whole.shape[0] == 1 and axis != 0:
            whole, axis = whole[0], None if axis is None else axis - 1
        return whole, axis
