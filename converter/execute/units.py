"""Units of work: row ranges of one parameter, numbered the same in every run of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arch_maps.dtypes import itemsize
from arch_maps.ops import row_count, sources, streamable
from converter.plan.model import Output
from converter.source import Source

UNIT_BYTES = 8 << 20
"""Source bytes of one unit; small enough that several in flight stay far below the memory bar."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``[start, stop)`` of output number ``output``; the journal knows it by ``number``."""

    number: int
    output: int
    start: int
    stop: int


def units_of(source: Source, outputs: Sequence[Output]) -> list[Unit]:
    """Every unit, numbered in output order."""
    return [
        Unit(number, index, start, stop)
        for number, (index, start, stop) in enumerate(_ranges(source, outputs))
    ]


def reading_order(source: Source, outputs: Sequence[Output], units: Sequence[Unit]) -> list[Unit]:
    """The units sorted by where their source lies, so that files are read front to back."""

    def position(unit: Unit) -> tuple[str, int, int]:
        leaf = next(iter(sources(outputs[unit.output].expr)), None)
        if leaf is None:
            return ("", 0, unit.start)
        info = source.tensors[leaf.name]
        return (info.file, info.start, unit.start)

    return sorted(units, key=position)


def _ranges(source: Source, outputs: Sequence[Output]) -> Iterator[tuple[int, int, int]]:
    for index, out in enumerate(outputs):
        rows = row_count(out.expr.shape)
        if not streamable(out.expr):
            yield index, 0, rows
            continue
        widths = (itemsize(source.tensors[leaf.name].dtype) for leaf in sources(out.expr))
        width = max(widths, default=4)
        row_bytes = max(1, width * math.prod(map(int, out.expr.shape[1:])))
        step = max(1, UNIT_BYTES // row_bytes)
        for start in range(0, rows, step):
            yield index, start, min(rows, start + step)
