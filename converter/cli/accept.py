"""convert accept: the stock runtimes on a checkpoint, as a table."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from converter.errors import GateError

_TERMINATED: Final = 128 + signal.SIGTERM
_STYLES: Final = {"pass": "green", "fail": "bold red", "not applicable": "dim"}


def accept_command(
    out: Path, *, only: tuple[str, ...], draft_model: Path | None, image: Path | None, as_json: bool
) -> None:
    """Tell each row as it ends, then the table; GateError when an applicable one fails."""
    from converter.acceptance import accept_output
    from converter.page import draw_page
    from converter.ui import Console

    console = Console()
    with _ended_by_terminate():
        report = accept_output(
            out,
            only=only,
            drafter=draft_model,
            image=image,
            progress=lambda one: console.say(
                f"  {one.verdict}: {one.row.title} ({one.seconds:.0f} s)"
            ),
        )
    draw_page(out, acceptance=report)
    if as_json:
        click.echo(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        _print(report)
    if report["verdict"] != "pass":
        failed = [f"{r['runtime']}: {r['name']}" for r in report["rows"] if r["verdict"] == "fail"]
        what = ", ".join(failed) or "no row applies to it"
        raise GateError(f"{out}: not accepted ({what}); see {out / 'acceptance.json'}")


@contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """Unwind when asked to terminate, so that no server outlives the command."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(report: Mapping[str, Any]) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("verdict", "runtime", "row", "what was seen"):
        table.add_column(column, overflow="fold")
    for row in report["rows"]:
        verdict = Text(row["verdict"], style=_STYLES[row["verdict"]])
        runtime = row["runtime"].replace("_", "-")
        table.add_row(verdict, runtime, Text(row["name"]), Text(row["note"]))
    RichConsole(highlight=False).print(table)
    click.echo(f"acceptance: {report['verdict']}")
