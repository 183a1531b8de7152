"""Results: rows with their bars, as a terminal table, Markdown, and JSON."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "=": operator.eq}
_HEADINGS = ("what", "measured", "bar", "verdict", "how")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured figure; without a ``bar`` it is only told."""

    what: str
    value: float
    unit: Literal["x", "s", "MiB", "GB/s", "tensors"]
    how: str
    """What was set against what, and the spread."""
    relation: Literal[">=", "<=", "<", "="] = "<="
    bar: float | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)
    """Every single run, for the JSON file."""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        return None if self.bar is None else bool(_COMPARE[self.relation](self.value, self.bar))

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row as text, in the order of the table's columns."""
        bar = "" if self.bar is None else f"{self.relation} {_spell(self.bar, self.unit)}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        return self.what, _spell(self.value, self.unit), bar, verdict, self.how


def _spell(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    if unit in ("s", "GB/s"):
        return f"{value:.2f} {unit}"
    return f"{value:.0f} {unit}"


def as_text(rows: Sequence[Row]) -> str:
    """An aligned table for a terminal."""
    cells = [_HEADINGS, *(row.cells for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADINGS) - 1)]
    lines = []
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append("  ".join((*padded, row[-1])).rstrip())
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row], *, facts: Mapping[str, str], remarks: Sequence[str]) -> str:
    """A document of the table, what it was measured on, and what to know when reading it."""
    lines = ["# Benchmark results", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *(f"{remark}\n" for remark in remarks)]
    lines += ["| " + " | ".join(_HEADINGS) + " |", "|" + "---|" * len(_HEADINGS)]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], *, facts: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """Everything measured, every single run included."""
    data = {
        "machine": dict(facts),
        "given": dict(given),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
    }
    return json.dumps(data, indent=1) + "\n"
