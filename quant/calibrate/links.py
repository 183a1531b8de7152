"""Which product a stored matrix stands for: from the map's expression to torch's parameters.

Both sides move elements: the map's expression makes the stored matrix of the release's tensors,
and transformers' conversion makes parameters of them. Numbering the elements of the tensors and
sending the numbers through shows where each column comes from; nothing is inferred from names or
shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.ops import Expr, RowReader, Source, evaluate, sources, streamable
from quant.calibrate.loading import Shapes, Weights
from quant.calibrate.products import Key
from quant.recipe import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
_SHIFT: Final = 44
"""Bits of an element's number within its tensor; the tensor's own number is above."""
_BLOCK: Final = 1 << 22
"""Elements that are numbered at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A matrix to calibrate, or a stack of them: the runtime's module and how it is made."""

    module: str
    expr: Expr
    dtype: str
    spec: QuantSpec
    table: bool = False
    """An embedding that the head multiplies by."""

    @property
    def stacked(self) -> bool:
        """Whether there is a matrix for each expert."""
        return len(self.expr.shape) == 3

    @property
    def count(self) -> int:
        """Matrices in the stack."""
        return int(self.expr.shape[0]) if self.stacked else 1


class Numbers:
    """A reader that gives the numbers of elements in place of their values."""

    def __init__(self, names: tuple[str, ...], shapes: Shapes) -> None:
        """Number the tensors ``names`` one after another."""
        self._index = {name: index for index, name in enumerate(names)}
        self._names = names
        self._shapes = shapes

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Numbers of rows ``[start, stop)``, int64."""
        shape = self._shapes[name]
        each = int(np.prod(shape[1:], dtype=np.int64))
        base = self._index[name] << _SHIFT
        flat = np.arange(base + start * each, base + stop * each, dtype=np.int64)
        return flat.reshape(stop - start, *shape[1:])

    def split(self, numbers: Array) -> tuple[Array, Array]:
        """Which of the names, and which element of it."""
        return numbers >> _SHIFT, numbers & ((1 << _SHIFT) - 1)

    def name(self, index: int) -> str:
        """The name with a number."""
        return self._names[index]


def matrix_rows(task: Task, reader: Any, index: int) -> Array:
    """Matrix ``index`` of a task, (rows, cols)."""
    if task.stacked:
        found: Array = evaluate(task.expr, reader, index, index + 1)[0]
        return found
    return evaluate(task.expr, reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where elements of a matrix are in one of the release's tensors, both as they lie in memory.

    Slices where they follow one another, else numbers of elements.
    """

    name: str
    tensor: slice | Array
    matrix: slice | Array

    def put(self, tensor: Tensor, values: Array) -> None:
        """Write a matrix's values into the tensor."""
        tensor.numpy().reshape(-1)[self.tensor] = values.reshape(-1)[self.matrix]

    def get(self, tensor: Tensor, out: Array) -> None:
        """Fill the matrix from the tensor's values."""
        assert out.flags.c_contiguous, "its elements are counted as they lie"
        out.reshape(-1)[self.matrix] = tensor.numpy().reshape(-1)[self.tensor]


def places_of(task: Task, index: int, shapes: Shapes) -> list[Place]:
    """Where the elements of matrix ``index`` of a task are, piece by piece."""
    names = tuple(dict.fromkeys(leaf.name for leaf in sources(task.expr)))
    if isinstance(task.expr, Source) and not task.stacked:
        return [Place(name=names[0], tensor=slice(None), matrix=slice(None))]
    numbers = Numbers(names, shapes)
    found = []
    for first, block in _blocks(task, numbers, index):
        which, element = (part.reshape(-1) for part in numbers.split(block))
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            own, theirs = _run(first + here), _run(element[here])
            found.append(Place(name=numbers.name(int(number)), tensor=theirs, matrix=own))
    return found


def _blocks(task: Task, numbers: Numbers, index: int) -> Iterator[tuple[int, Array]]:
    """Numbers of a matrix's elements, a block of rows at a time, with the first one's place."""
    rows, columns = (int(size) for size in task.expr.shape[-2:])
    if task.stacked or not streamable(task.expr):
        yield 0, matrix_rows(task, numbers, index)
        return
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        yield start * columns, evaluate(task.expr, numbers, start, min(start + step, rows))


def _run(numbers: Array) -> slice | Array:
    first, count = int(numbers[0]), len(numbers)
    following = bool((np.diff(numbers) == 1).all())
    return slice(first, first + count) if following else numbers


def stored_rows(task: Task, reader: RowReader, index: int) -> Array:
    """Matrix ``index`` of a task in the dtype that it is stored from."""
    from quant.floats import cast

    rows = np.ascontiguousarray(matrix_rows(task, reader, index))
    return np.ascontiguousarray(cast(rows, task.dtype))


@dataclass(frozen=True, slots=True)
class _Use:
    """One of the release's matrices: what it becomes, and which of its axes is summed over."""

    key: Key
    axis: int
    results: Array | None
    """Which of the product's results each index along the other axis makes; None for no order."""


class Links:
    """The products that the release's tensors take part in, for some parameters."""

    def __init__(self, weights: Weights, shapes: Shapes, axes: Mapping[Key, int]) -> None:
        """``axes`` are the summed axes of the products seen."""
        self._shapes = shapes
        self._axes = axes
        self._uses: dict[tuple[str, int | None], _Use] = {}
        groups = {id(g): g for name, _ in axes if (g := weights.group_of.get(name)) is not None}
        for group in groups.values():
            mine = {key: axis for key, axis in axes.items() if key[0] in group.parameters}
            if group.converter is None:
                (name,) = group.names
                for key, axis in mine.items():
                    own = axis + len(shapes[name]) - 2
                    results = np.arange(shapes[name][_other(own, len(shapes[name]))])
                    self._uses[name, key[1]] = _Use(key, own, results)
            else:
                self._follow(weights, group, mine)

    def _follow(self, weights: Weights, group: Any, mine: Mapping[Key, int]) -> None:
        """Send numbers of tensors, then of places along each axis, through the conversion."""
        import torch

        names = group.names
        shapes = {name: self._shapes[name] for name in names}

        def converted(values: Mapping[str, Any]) -> dict[str, Any]:
            return weights.convert(group, values)

        def along(axis: int) -> dict[str, Any]:
            found = {}
            for name, shape in shapes.items():
                at = min(axis, len(shape) - 1)
                view = [1] * len(shape)
                view[at] = shape[at]
                places = torch.arange(shape[at], dtype=torch.int32).view(view)
                found[name] = places.expand(shape)
            return converted(found)

        ids = converted(
            {n: torch.tensor(i, dtype=torch.int32).expand(shapes[n]) for i, n in enumerate(names)}
        )
        results: dict[tuple[Key, str], Any] = {}
        for key, axis in mine.items():
            matrix = _slice(ids[key[0]], key)
            column = matrix.select(axis, 0)
            if not bool((matrix == column.unsqueeze(axis)).all()):
                continue  # joined along the summed axis: no matrix of its own
            for index in column.unique().tolist():
                results[key, names[index]] = (column == index).nonzero()[:, 0]
        del ids
        summed: dict[tuple[Key, str], int] = {}
        made: dict[tuple[Key, str, int], Array] = {}
        for axis in range(max(len(shape) for shape in shapes.values())):
            places = along(axis)
            for (key, name), rows in results.items():
                shape = shapes[name]
                if axis >= len(shape):
                    continue
                matrix = _slice(places[key[0]], key)
                line = matrix.select(1 - mine[key], int(rows[0])).numpy()
                if len(line) == shape[axis] and (line == np.arange(len(line))).all():
                    summed[key, name] = axis
                made[key, name, axis] = matrix.select(mine[key], 0)[rows].numpy()
        for (key, name), axis in summed.items():
            dims = len(shapes[name])
            order = made[key, name, _other(axis, dims)]
            found = None
            if (np.sort(order) == np.arange(shapes[name][_other(axis, dims)])).all():
                found = np.empty(len(order), np.int64)
                found[order] = results[key, name].numpy()
            self._uses[name, key[1] if dims == 3 else None] = _Use(key, axis, found)

    def members(self, parameter: str) -> list[Key]:
        """The products of each matrix in a stack."""
        return [key for key in self._axes if key[0] == parameter]

    def feeds(self, task: Task) -> list[Key] | None:
        """For each matrix of ``task`` the product it stands for; None where one has none.

        The columns of each must be those of the product, in order.
        """
        names = tuple(dict.fromkeys(leaf.name for leaf in sources(task.expr)))
        numbers = Numbers(names, self._shapes)
        found = []
        for index in range(task.count):
            row = matrix_rows(task, numbers, index)[0]
            which, element = numbers.split(row)
            name = names[int(which[0])]
            shape = self._shapes[name]
            places = np.unravel_index(element, shape)
            expert = int(places[0][0]) if len(shape) == 3 else None
            use = self._uses.get((name, expert))
            if use is None or (which != which[0]).any():
                return None
            line = places[use.axis]
            if len(line) != shape[use.axis] or (line != np.arange(len(line))).any():
                return None
            found.append(use.key)
        return found

    def factors(
        self, task: Task, index: int, inputs: Mapping[Key, Array], results: Mapping[Key, Array]
    ) -> tuple[Array, Array] | None:
        """Numbers for the rows and for the columns of matrix ``index`` of ``task``, by the product.

        ``inputs`` has one for each entry that a product sums over, ``results`` one for each that it
        makes. A matrix that is stored as the product's transpose has them the other way round. Rows
        of several products share the mean of their columns' numbers, weighed by the rows' own. None
        where an element stands in no single place of one of these products.
        """
        names = tuple(dict.fromkeys(leaf.name for leaf in sources(task.expr)))
        numbers = Numbers(names, self._shapes)
        rows, columns = (int(size) for size in task.expr.shape[-2:])
        over_rows, over_columns, weight = np.zeros(rows), np.zeros(columns), 0.0
        for first, block in _blocks(task, numbers, index):
            start = first // columns
            which = block[:, 0] >> _SHIFT
            for number in np.unique(which):
                here = np.flatnonzero(which == number)
                place = self._place(names[int(number)], numbers, block[here, 0], block[here[0]])
                if place is None or not (place[0].key in inputs and place[0].key in results):
                    return None
                use, along_rows, along_columns, turned = place
                sides = (inputs, results) if turned else (results, inputs)
                mine = sides[0][use.key][along_rows]
                over_rows[start + here] = mine
                over_columns += mine.sum() * sides[1][use.key][along_columns]
                weight += mine.sum()
        return over_rows, over_columns / (weight or 1.0)

    def _place(
        self, name: str, numbers: Numbers, column: Array, row: Array
    ) -> tuple[_Use, Array, Array, bool] | None:
        """The product of a tensor's elements: its entries down a column, along a row; if turned."""
        which, element = numbers.split(row)
        if (which != which[0]).any():
            return None
        shape = self._shapes[name]
        down = np.unravel_index(numbers.split(column)[1], shape)
        across = np.unravel_index(element, shape)
        expert = int(across[0][0]) if len(shape) == 3 else None
        use = self._uses.get((name, expert))
        if use is None or use.results is None:
            return None
        other = _other(use.axis, len(shape))
        fixed = [axis for axis in range(len(shape)) if axis not in (use.axis, other)]
        if any((line[axis] != across[axis][0]).any() for axis in fixed for line in (down, across)):
            return None
        turned = bool((across[use.axis] == across[use.axis][0]).all()) and len(row) > 1
        constant = (other, use.axis) if turned else (use.axis, other)
        if (down[constant[0]] != down[constant[0]][0]).any():
            return None
        if (across[constant[1]] != across[constant[1]][0]).any():
            return None
        if turned:
            return use, down[use.axis], use.results[across[other]], True
        return use, use.results[down[other]], across[use.axis], False


def _other(axis: int, dims: int) -> int:
    """The other axis of the matrices in a tensor of ``dims`` axes."""
    return 2 * dims - 3 - axis


def _slice(parameter: Any, key: Key) -> Any:
    return parameter if key[1] is None else parameter[key[1]]
