"""The ledger as a table, and as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from converter.batch.catalogue import Entry
from converter.ui import size_text

_UNFOLDED: Final = 10_000


def rows_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every job as plain data; times are ISO 8601 in UTC, sizes are bytes."""
    return [_row(entry) for entry in entries]


def _row(entry: Entry) -> dict[str, Any]:
    job, release = entry.job, entry.release
    facts = dict(job.facts)
    return {
        "job": job.id,
        "repo": release.repo,
        "commit": release.commit,
        "variant": job.variant,
        "kind": job.kind,
        "target": job.target,
        "state": entry.state,
        "stage": job.stage,
        "attempts": dict(job.attempts),
        "crashes": job.crashes,
        "lost": job.lost,
        "class": job.error_class,
        "error": job.error,
        "due": iso(job.not_before),
        "needs": job.needs,
        "host": job.host,
        "owner": release.owner if entry.running else None,
        "heartbeat": iso(release.heartbeat),
        "peak_memory": job.peak_memory,
        "recipe": job.recipe,
        "recipe_hash": job.recipe_hash,
        "tools": job.tools,
        "created": iso(job.created),
        "updated": iso(job.updated),
        "facts": facts,
    }


def iso(seconds: float | None) -> str | None:
    """A time as text."""
    if seconds is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def print_table(entries: Sequence[Entry]) -> None:
    """The jobs for a terminal, one line each, and why those that failed did."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("job", "target", "state", "stage", "size", "parity", "KL", "reason"):
        table.add_column(title, overflow="fold" if title in ("target", "reason") else "ellipsis")
    colours = {"published": "green", "running": "cyan", "parked": "red", "quarantined": "red"}
    for entry in entries:
        job = entry.job
        parity = job.facts.get("parity") or {}
        reason = f"{job.error_class}: {job.error.splitlines()[0]}" if job.error else ""
        colour = colours.get(entry.state, "yellow")
        table.add_row(
            str(job.id),
            job.target,
            f"[{colour}]{entry.state}[/]",
            job.stage or "",
            size_text(job.facts["output_bytes"]) if "output_bytes" in job.facts else "",
            _number(parity.get("error")),
            _number(parity.get("kl")),
            _plain(reason),
        )
    # Whoever reads it line by line has no width; a terminal has its own.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNFOLDED)
    console.print(table)
    console.print(f"{len(entries)} jobs")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else ""
