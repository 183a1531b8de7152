"""What one run of a model put into its modules and got out of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["in", "out"]
Values = NDArray[np.float32]
MOST: Final = 1 << 20
"""Values kept of one call of a text, which is short: all of them in any model."""
MOST_OF_MEDIA: Final = 1 << 16
"""The same of a picture or a sound: towers have thousands of modules with as many rows each."""


@dataclass(frozen=True, slots=True)
class Call:
    """Values of one call: all of them in their shape, or some of their rows as [rows, size]."""

    values: Values
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return self.values.shape == self.shape


def kept_rows(shape: Sequence[int], most: int) -> NDArray[np.int64] | None:
    """Which rows of all but the last axis are kept of a call, evenly spread; None for all."""
    size = max(1, shape[-1]) if shape else 1
    rows = math.prod(shape[:-1])
    if rows * size <= most:
        return None
    kept = max(1, most // size)
    return np.linspace(0, rows - 1, num=min(kept, rows)).astype(np.int64)


@dataclass(slots=True)
class Trace:
    """Inputs and outputs of modules by path, in the order in which they were first seen.

    A module that runs for each token apart is one event that grows.
    """

    most: int = MOST
    """Values kept of each call."""
    events: dict[tuple[str, Side], list[Call]] = field(default_factory=dict)
    _ended: dict[tuple[str, Side], None] = field(default_factory=dict)
    """The events by their last calls."""

    def add(self, path: str, side: Side, values: Any, shape: Sequence[int] | None = None) -> None:
        """Note what went into or came out of a call of ``path``.

        ``shape`` is that of the call where ``values`` are only the ``kept_rows`` of it.
        """
        array = np.asarray(values, np.float32)
        call = Call(array, tuple(array.shape if shape is None else shape))
        self.events.setdefault((path, side), []).append(call)
        self._ended.pop((path, side), None)
        self._ended[path, side] = None

    def ended(self) -> Iterator[tuple[str, Side]]:
        """The events in the order of their last calls."""
        return iter(self._ended)

    def __iter__(self) -> Iterator[tuple[str, Side]]:
        """The events in order."""
        return iter(self.events)

    def values(self, path: str, side: Side) -> tuple[Call, int | None] | None:
        """All calls as one, and the axis along which they follow one another.

        Leading axes of size one are left out. The axis is None for a single call. None as a whole
        where the calls differ along more than one axis, or along none without being single tokens,
        or where rows were left out of one of several.
        """
        found = self.events.get((path, side))
        if not found or any(call.values.ndim == 0 for call in found):
            return None
        if len(found) == 1:
            (call,) = found
            return Call(_squeezed(call.values) if call.whole else call.values, _bare(call)), None
        arrays = [call.values for call in found]
        if len({array.ndim for array in arrays}) > 1 or not all(call.whole for call in found):
            return None
        shapes = {array.shape for array in arrays}
        varying = [n for n, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        if not varying and arrays[0].shape[-2:-1] == (1,):
            varying = [arrays[0].ndim - 2]  # single tokens from the first call on
        if len(varying) != 1:
            return None
        joined = np.concatenate(arrays, varying[0])
        whole = _squeezed(joined)
        return Call(whole, whole.shape), varying[0] - (joined.ndim - whole.ndim)


def _squeezed(array: Values) -> Values:
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return array


def _bare(call: Call) -> tuple[int, ...]:
    shape = call.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
