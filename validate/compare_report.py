"""A comparison of several checkpoints of one release: for a terminal, and as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from validate.charts import layer_chart, pareto_chart
from validate.report import page

Row = Mapping[str, Any]
_LEAST_WIDTH: Final = 100
_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Column:
    """A figure of every row: its heading, its key, and how many decimals are shown."""

    title: str
    key: str
    digits: int = 4
    scale: float = 1.0

    def text(self, row: Row) -> str:
        """The figure; a dash where a row has none."""
        value = row.get(self.key)
        return "-" if value is None else f"{self.scale * value:.{self.digits}f}"

    def error(self, row: Row) -> str:
        """Its standard error, empty where there is none."""
        value = row.get(f"{self.key}_error")
        return "" if value is None else f"{self.scale * value:.{self.digits}f}"


_SIZE: Final = (
    Column("MB", "bytes", 2, 1e-6),
    Column("bits/weight", "bits_per_weight", 3),
)
_MAIN: Final = (
    *_SIZE,
    Column("KL mean", "kl_mean", 5),
    Column("x control", "kl_of_control", 2),
    Column("perplexity ratio", "perplexity_ratio", 4),
    Column("same top, %", "top1", 2, 100),
)
_MORE: Final = (
    Column("perplexity", "perplexity", 3),
    Column("RMS dp, %", "moved_rms", 3, 100),
    Column("KL median", "kl_median", 5),
    Column("p90", "kl_p90"),
    Column("p99", "kl_p99"),
    Column("p99.9", "kl_p999"),
    Column("max", "kl_max"),
    Column("SQNR, dB", "sqnr", 1),
)


def print_comparison(report: Mapping[str, Any]) -> None:
    """The tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(_LEAST_WIDTH, console.width)  # a wrapped table cannot be read
    text = report["text"]
    console.print(
        f"{report['release']}: {report['tokens']} scored tokens of {text['name']} in windows of "
        f"{text['length']}, perplexity {report['perplexity_base']:.3f}; ± is one standard error",
        markup=False,
    )
    for columns in (_MAIN, _MORE):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("checkpoint", overflow="fold")
        for column in columns:
            table.add_column(column.title, justify="right", no_wrap=True)
        for row in report["rows"]:
            cells = []
            for column in columns:
                error = column.error(row)
                cells.append(column.text(row) + (f" ±{error}" if error else ""))
            style = "dim" if row["control"] else None
            table.add_row(str(row["name"]), *cells, style=style)
        console.print()
        console.print(table)


def comparison_html(report: Mapping[str, Any]) -> str:
    """One page: no scripts, nothing fetched, all text escaped."""
    rows: Sequence[Row] = report["rows"]
    return page(
        "compare.html.j2",
        report=report,
        tables=[("At a glance", _MAIN), ("Distributions", _MORE)],
        sizes=pareto_chart(
            [(r["name"], r["bits_per_weight"], r["kl_mean"], bool(r["control"])) for r in rows],
            title="mean KL against bits per weight",
            x_label="bits per weight",
        ),
        layers=layer_chart(
            [(r["name"], [] if r["control"] else layer_errors(r["tensors"])) for r in rows],
            title="error of each layer",
            x_label="layer",
        ),
    )


def layer_errors(tensors: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Squared error over energy of each numbered layer; empty where no name has a number."""
    sums: dict[int, tuple[float, float]] = {}
    for name, value in tensors.items():
        if (match := _LAYER.search(name)) is not None:
            signal, noise = sums.get(int(match[1]), (0.0, 0.0))
            sums[int(match[1])] = (signal + value["signal"], noise + value["noise"])
    found = [sums.get(i, (1.0, 0.0)) for i in range(max(sums, default=-1) + 1)]
    return [noise / signal if signal else 0.0 for signal, noise in found]
