"""Units of work: row ranges of one parameter, numbered the same in every run of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arch_maps.dtypes import itemsize
from arch_maps.ops import (
    Concat,
    Expr,
    Permute,
    Reshape,
    Slice,
    Stack,
    children,
    row_count,
    sources,
    streamable,
)
from arch_maps.ops import Source as Leaf
from converter.plan.model import Output
from converter.source import Source

UNIT_BYTES = 8 << 20
"""Source bytes of one unit; small enough that several in flight stay far below the memory bar."""
PIECE_BYTES = 2 << 20
"""Source bytes that are read and encoded at a time, so that the processor's cache holds them.

Units are larger, since each is kept in mind and recorded.
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``[start, stop)`` of output number ``output``; the journal knows it by ``number``."""

    number: int
    output: int
    start: int
    stop: int
    step: int
    """Rows of a piece."""

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Its rows by the piece, in order."""
        for start in range(self.start, self.stop, self.step):
            yield start, min(self.stop, start + self.step)


def units_of(source: Source, outputs: Sequence[Output]) -> list[Unit]:
    """Every unit, numbered in output order."""
    return [
        Unit(number, index, start, stop, step)
        for number, (index, start, stop, step) in enumerate(_ranges(source, outputs))
    ]


def reading_order(source: Source, outputs: Sequence[Output], units: Sequence[Unit]) -> list[Unit]:
    """The units sorted by where their source lies, so that files are read front to back."""
    return sorted(units, key=lambda unit: (*place(source, outputs, unit), unit.number))


def writing_order(outputs: Sequence[Output], units: Sequence[Unit]) -> list[Unit]:
    """The units sorted by where they are stored, so that files are whole from the front early.

    Their hashes then keep up with them: what is hashed late has left the page cache by then.
    """
    places = [min((part.file, part.start) for part in out.stored.values()) for out in outputs]
    return sorted(units, key=lambda unit: (places[unit.output], unit.number))


def place(source: Source, outputs: Sequence[Output], unit: Unit) -> tuple[str, int]:
    """File and byte at which a unit's first row lies; of a file without a name, where none does."""
    found = _first(outputs[unit.output].expr, unit.start)
    if found is None:
        return ("", 0)
    leaf, row = found
    info = source.tensors[leaf.name]
    return (info.file, info.start + info.nbytes * row // row_count(info.shape))


def _first(expr: Expr, row: int) -> tuple[Leaf, int] | None:
    """The source tensor, and its row, that row ``row`` of ``expr`` begins with."""
    match expr:
        case Leaf():
            return expr, row
        case Stack(axis=0):  # one expert after another, wherever each of them lies
            return _first(expr.parts[row], 0)
        case Concat(axis=0):
            part, low, _ = next(span for span in expr.spans() if span[1] <= row < span[2])
            return _first(part, row - low)
        case Slice(axis=0):
            return _first(expr.x, row + expr.start)
        case Reshape():
            wide, narrow = math.prod(expr.shape[1:]), math.prod(expr.x.shape[1:])
            return _first(expr.x, row * wide // narrow if narrow else 0)
        case Permute() if not expr.row_local:
            return _first(expr.x, 0)
        case _:
            below = children(expr)
            return _first(below[0], row) if below else None


def _ranges(source: Source, outputs: Sequence[Output]) -> Iterator[tuple[int, int, int, int]]:
    for index, out in enumerate(outputs):
        rows = row_count(out.expr.shape)
        if not streamable(out.expr):
            yield index, 0, rows, max(1, rows)
            continue
        widths = (itemsize(source.tensors[leaf.name].dtype) for leaf in sources(out.expr))
        width = max(widths, default=4)
        row_bytes = max(1, width * math.prod(map(int, out.expr.shape[1:])))
        step, piece = max(1, UNIT_BYTES // row_bytes), max(1, PIECE_BYTES // row_bytes)
        for start in range(0, rows, step):
            yield index, start, min(rows, start + step), piece
