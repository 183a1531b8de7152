"""Where a stored matrix's elements are in the parameters that torch computes with.

The map moves elements from the release's tensors to matrices, transformers' conversion moves them
to parameters. Both ways are followed by numbers of elements, once; from then on gradients and
values go straight between a matrix and its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quant.calibrate.links import Place
from quant.calibrate.loading import Group, Shapes, Weights

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Leaf = tuple[str, int | None]
"""A parameter by name, and the expert whose matrix is meant where it stacks one for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Elements of a matrix in one parameter, or one expert's part of it, both as they lie."""

    leaf: Leaf
    parameter: slice | Array
    matrix: slice | Array

    def get(self, tensor: Tensor, out: Array) -> None:
        """Fill the matrix's elements from the leaf's."""
        assert out.flags.c_contiguous, "its elements are counted as they lie"
        out.reshape(-1)[self.matrix] = tensor.contiguous().numpy().reshape(-1)[self.parameter]

    def put(self, tensor: Tensor, values: Array) -> None:
        """Write the matrix's elements into the leaf, which must be contiguous."""
        assert tensor.is_contiguous(), "its elements are counted as they lie"
        tensor.numpy().reshape(-1)[self.parameter] = values.reshape(-1)[self.matrix]


class Slots:
    """The slots of matrices whose places in the release's tensors are known."""

    def __init__(self, weights: Weights, shapes: Shapes) -> None:
        """``shapes`` are those of the release's tensors."""
        self._weights = weights
        self._shapes = shapes
        self._group_of = {name: group for group in weights.groups for name in group.names}
        self._followed: _Followed | None = None

    def of(self, places: Sequence[Place]) -> list[Slot]:
        """The slots that the elements in ``places`` end up in.

        Cheapest for matrices of one group of tensors after another: one group is held at a time.
        """
        found: list[Slot] = []
        for place in places:
            group = self._group_of[place.name]
            if group.converter is None:
                shape = self._shapes[place.name]
                found += _by_expert(group.first, shape, place.tensor, place.matrix)
                continue
            if self._followed is None or self._followed.group is not group:
                self._followed = None  # before the next is made
                self._followed = _Followed(self._weights, group, self._shapes)
            found += self._followed.slots(place)
        return found


class _Followed:
    """Which element of which parameter each element of a group's tensors becomes."""

    def __init__(self, weights: Weights, group: Group, shapes: Shapes) -> None:
        self.group = group
        values = numbered({name: shapes[name] for name in group.names})
        self._first: dict[str, int] = {}
        total = 0
        for name, value in values.items():
            self._first[name] = total
            total += value.numel()
        self._sizes = {name: value.numel() for name, value in values.items()}
        made = {n: v for n, v in weights.convert(group, values).items() if n in weights.names}
        del values
        self._parameters = list(made)
        self._shapes = {name: tuple(value.shape) for name, value in made.items()}
        wide = total >= 1 << 31
        self._element = np.zeros(total, np.int64 if wide else np.int32)
        self._which = np.zeros(total, np.uint8) if len(made) > 1 else None
        for number, name in enumerate(self._parameters):
            sources = made.pop(name).reshape(-1).numpy()
            self._element[sources] = np.arange(len(sources), dtype=self._element.dtype)
            if self._which is not None:
                self._which[sources] = number

    def slots(self, place: Place) -> Iterator[Slot]:
        first, size = self._first[place.name], self._sizes[place.name]
        own = slice(first, first + size)
        element = self._element[own][place.tensor]
        if self._which is None:
            (name,) = self._parameters
            yield from _by_expert(name, self._shapes[name], element, place.matrix)
            return
        which = self._which[own][place.tensor]
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            name = self._parameters[int(number)]
            matrix = _part(place.matrix, here)
            yield from _by_expert(name, self._shapes[name], element[here], matrix)


def numbered(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Numbers of all elements, tensor after tensor, in place of their values."""
    import torch

    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    kind = torch.int32 if sum(sizes) < 1 << 31 else torch.int64
    each = torch.split(torch.arange(sum(sizes), dtype=kind), sizes)
    return {n: own.view(*shape) for (n, shape), own in zip(shapes.items(), each, strict=True)}


def _by_expert(
    name: str, shape: Sequence[int], element: slice | Array, matrix: slice | Array
) -> Iterator[Slot]:
    """Slots of elements of a parameter: one, or one for each expert's matrix."""
    if len(shape) < 3:
        yield Slot(leaf=(name, None), parameter=_run(element), matrix=_run(matrix))
        return
    each = int(np.prod(shape[1:]))
    if isinstance(element, slice):
        start, stop, _ = element.indices(int(np.prod(shape)))
        if start // each == (stop - 1) // each:
            base = start - start % each
            own = slice(start - base, stop - base)
            yield Slot(leaf=(name, start // each), parameter=own, matrix=_run(matrix))
            return
        element = np.arange(start, stop)
    experts = element // each
    for expert in np.unique(experts):
        here = np.flatnonzero(experts == expert)
        yield Slot(
            leaf=(name, int(expert)),
            parameter=_run(element[here] % each),
            matrix=_run(_part(matrix, here)),
        )


def _part(elements: slice | Array, here: Array) -> Array:
    """Those of ``elements`` that stand at ``here``."""
    return elements.start + here if isinstance(elements, slice) else elements[here]


def _run(elements: slice | Array) -> slice | Array:
    """A slice where elements follow one another; else their numbers, as small as they fit."""
    if isinstance(elements, slice):
        return elements
    if bool((np.diff(elements) == 1).all()):
        return slice(int(elements[0]), int(elements[-1]) + 1)
    return elements.astype(np.int32) if elements.max() < 1 << 31 else elements
