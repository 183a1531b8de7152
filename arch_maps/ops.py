"""Tensor expressions: what an output tensor is made of, row by row, and how to undo it.

An expression is a small immutable tree with source tensors at its leaves. Each node knows its
output shape, which rows of its children a range of its own rows needs, and its inverse (or that
it has none). Nothing here reads a file: ``evaluate`` asks a ``RowReader`` for rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class RowReader(Protocol):
    """Gives rows ``[start, stop)`` along axis 0 of a named tensor; a scalar has one row."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows ``[start, stop)`` of the tensor ``name`` in its own dtype."""


def row_count(shape: Shape) -> int:
    """Rows along axis 0; a scalar counts as one row."""
    return shape[0] if shape else 1


@lru_cache(maxsize=1024)  # layers repeat each other
def plain(shape: Shape) -> Shape:
    """The same sizes without names: with them, every product spells one out."""
    return tuple(map(int, shape))


@lru_cache(maxsize=1024)
def element_count(shape: Shape) -> int:
    """Elements of a tensor, as a plain number."""
    return math.prod(plain(shape))


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint that is read, with the shape that the map declares for it."""

    name: str
    shape: Shape

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Read rows ``[start, stop)``."""
        return reader.read_rows(self.name, start, stop)


@dataclass(frozen=True, slots=True)
class Permute:
    """Axes reordered as ``numpy.transpose(x, axes)``."""

    x: Expr
    axes: tuple[int, ...]

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return tuple(self.x.shape[axis] for axis in self.axes)

    @property
    def row_local(self) -> bool:
        """Whether output rows need only the same rows of the input."""
        return self.axes[0] == 0

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        if self.row_local:
            return evaluate(self.x, reader, start, stop).transpose(self.axes)
        return evaluate(self.x, reader).transpose(self.axes)[start:stop]


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in C order under another shape."""

    x: Expr
    shape: Shape

    def __post_init__(self) -> None:
        assert math.prod(self.shape) == math.prod(self.x.shape), (self.shape, self.x.shape)

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        wide = math.prod(self.shape[1:])
        narrow = math.prod(self.x.shape[1:])
        if narrow == 0 or wide == 0:
            return evaluate(self.x, reader).reshape(self.shape)[start:stop]
        first, last = start * wide, stop * wide  # in elements
        lead, end = first // narrow, -(-last // narrow)
        flat = evaluate(self.x, reader, lead, end).reshape(-1)
        picked = flat[first - lead * narrow : last - lead * narrow]
        return picked.reshape(stop - start, *self.shape[1:]) if self.shape else picked.reshape(())


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements ``[start, stop)`` along one axis."""

    x: Expr
    axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop <= self.x.shape[self.axis], self

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return _with_axis(self.x.shape, self.axis, self.stop - self.start)

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        if self.axis == 0:
            return evaluate(self.x, reader, start + self.start, stop + self.start)
        index = (slice(None),) * self.axis + (slice(self.start, self.stop),)
        return evaluate(self.x, reader, start, stop)[index]


@dataclass(frozen=True, slots=True)
class Concat:
    """Inputs joined along one axis."""

    parts: tuple[Expr, ...]
    axis: int = 0

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        total = sum(part.shape[self.axis] for part in self.parts)
        return _with_axis(self.parts[0].shape, self.axis, total)

    def spans(self) -> Iterator[tuple[Expr, int, int]]:
        """Yield each input with its range along the axis."""
        at = 0
        for part in self.parts:
            size = part.shape[self.axis]
            yield part, at, at + size
            at += size

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        if self.axis != 0:
            pieces = [evaluate(part, reader, start, stop) for part in self.parts]
        else:
            pieces = [
                evaluate(part, reader, max(start, low) - low, min(stop, high) - low)
                for part, low, high in self.spans()
                if low < stop and high > start
            ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)


@dataclass(frozen=True, slots=True)
class Stack:
    """Inputs of one shape joined along a new axis."""

    parts: tuple[Expr, ...]
    axis: int = 0

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        shape = self.parts[0].shape
        return (*shape[: self.axis], len(self.parts), *shape[self.axis :])

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        if self.axis == 0:
            return np.stack([evaluate(part, reader) for part in self.parts[start:stop]])
        pieces = [evaluate(part, reader, start, stop) for part in self.parts]
        return np.stack(pieces, axis=self.axis)


@dataclass(frozen=True, slots=True)
class Affine:
    """``x * scale + offset`` in float32, rounded once when the result is stored."""

    x: Expr
    scale: float = 1.0
    offset: float = 0.0

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return self.x.shape

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result, in float32."""
        value = evaluate(self.x, reader, start, stop).astype(np.float32)
        if self.scale != 1.0:
            value = value * np.float32(self.scale)
        return value + np.float32(self.offset) if self.offset else value


@dataclass(frozen=True, slots=True)
class Constant:
    """A float32 tensor of one value; it reads nothing and inverts to nothing."""

    shape: Shape
    value: float

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result."""
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return np.full(shape, self.value, np.float32)


@dataclass(frozen=True, slots=True)
class LowRank:
    """``x + scale * (up @ down)``: a LoRA adapter folded into the matrix [out, in] it adapts.

    As MLX computes it in the dtype of ``x``: the product, its multiple and the sum are rounded one
    after the other. The product is added up in float64, so that no order of its terms shows.
    Who holds the sum alone cannot tell the matrix from the adapter.
    """

    x: Expr
    up: Expr
    down: Expr
    scale: float = 1.0
    wide: bool = False
    """Computed in float32 whatever the dtype of ``x``: what takes an adapter off again."""

    def __post_init__(self) -> None:
        (out, inp), (rows, rank) = self.x.shape, self.up.shape
        assert rows == out, self
        assert self.down.shape == (rank, inp), self

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return self.x.shape

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result, in the dtype of ``x`` or float32."""
        value = evaluate(self.x, reader, start, stop)
        value = value.astype(np.float32) if self.wide else value
        up = evaluate(self.up, reader, start, stop).astype(np.float64)
        product = up @ evaluate(self.down, reader).astype(np.float64)
        delta = product.astype(np.float32).astype(value.dtype)
        folded: np.ndarray = value + delta * value.dtype.type(self.scale)
        return folded


@dataclass(frozen=True, slots=True)
class HeadHadamard:
    """Every run of ``head`` entries along ``axis`` (0 or 1) times the Hadamard matrix.

    The matrix is Sylvester's over sqrt(head), symmetric and orthogonal, so that the op is its own
    inverse. Added up in float64 in a fixed order and rounded to float32 once.
    """

    x: Expr
    axis: int
    head: int

    def __post_init__(self) -> None:
        assert self.head & (self.head - 1) == 0, self
        assert self.axis in (0, 1), self
        assert self.x.shape[self.axis] % self.head == 0, self

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return self.x.shape

    def rows(self, reader: RowReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of the result, in float32; along axis 0 from whole heads."""
        low, high = start, stop
        if self.axis == 0:
            low, high = start // self.head * self.head, -(-stop // self.head) * self.head
        value = evaluate(self.x, reader, low, high).astype(np.float64)
        ahead, behind = value.shape[: self.axis], value.shape[self.axis + 1 :]
        size, step = value.shape[self.axis], 1
        while step < self.head:
            pairs = value.reshape(*ahead, size // (2 * step), 2, step, *behind)
            first, second = np.split(pairs, 2, axis=self.axis + 1)
            value = np.concatenate([first + second, first - second], axis=self.axis + 1)
            step *= 2
        value = value.reshape(*ahead, size, *behind) / math.sqrt(self.head)
        turned: np.ndarray = value.astype(np.float32)[start - low : stop - low]
        return turned


Expr = (
    Source | Permute | Reshape | Slice | Concat | Stack | Affine | Constant | LowRank | HeadHadamard
)


def evaluate(expr: Expr, reader: RowReader, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows ``[start, stop)`` of ``expr`` (all of them by default)."""
    return expr.rows(reader, start, row_count(expr.shape) if stop is None else stop)


_JOINED = (Concat, Stack)
_LEAVES = (Source, Constant)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Direct inputs of a node."""
    if isinstance(expr, _JOINED):
        return expr.parts
    if isinstance(expr, LowRank):
        return (expr.x, expr.up, expr.down)
    return () if isinstance(expr, _LEAVES) else (expr.x,)


def sources(expr: Expr) -> tuple[Source, ...]:
    """Every leaf that reads a tensor, left to right, repeats included."""
    if isinstance(expr, Source):  # nearly every expression of a large release
        return (expr,)
    return tuple(leaf for child in children(expr) for leaf in sources(child))


def factors(expr: Expr) -> tuple[Source, ...]:
    """The leaves of the adapters that are folded into ``expr``."""
    own = (*sources(expr.up), *sources(expr.down)) if isinstance(expr, LowRank) else ()
    inner = (expr.x,) if isinstance(expr, LowRank) else children(expr)
    return own + tuple(leaf for child in inner for leaf in factors(child))


def streamable(expr: Expr) -> bool:
    """Whether rows can be made without holding a whole input tensor in memory."""
    if isinstance(expr, Source):
        return True
    if isinstance(expr, LowRank) or (isinstance(expr, Permute) and not expr.row_local):
        return False
    return all(streamable(child) for child in children(expr))


def exact(expr: Expr) -> bool:
    """Whether the result holds the bits of its inputs (only moves, no arithmetic)."""
    if isinstance(expr, Affine | Constant | LowRank | HeadHadamard):
        return False
    return all(map(exact, children(expr)))


def passes_through(expr: Expr) -> bool:
    """Whether the result is one source tensor byte for byte (reshapes included)."""
    if isinstance(expr, Reshape):
        return passes_through(expr.x)
    return isinstance(expr, Source)


def describe(expr: Expr) -> str:
    """One line of text for plans and tables."""
    match expr:
        case Source():
            return expr.name
        case Permute():
            return f"permute({describe(expr.x)}, {','.join(map(str, expr.axes))})"
        case Reshape():
            return f"reshape({describe(expr.x)}, {'x'.join(map(str, expr.shape))})"
        case Slice():
            return f"slice({describe(expr.x)}, axis={expr.axis}, {expr.start}:{expr.stop})"
        case Concat() | Stack():
            word = "concat" if isinstance(expr, Concat) else "stack"
            inner = ", ".join(map(describe, expr.parts))
            return f"{word}([{inner}], axis={expr.axis})"
        case Affine():
            return f"affine({describe(expr.x)}, *{expr.scale:g} +{expr.offset:g})"
        case Constant():
            return f"constant({'x'.join(map(str, expr.shape))}, {expr.value:g})"
        case LowRank():
            inner = ", ".join(map(describe, children(expr)))
            return f"lowrank({inner}, *{expr.scale:g})"
        case HeadHadamard():
            return f"hadamard({describe(expr.x)}, axis={expr.axis}, heads of {int(expr.head)})"


def _with_axis(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])
