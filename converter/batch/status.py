"""The ledger as a table, and as JSON."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from converter.batch.catalogue import Entry
from converter.batch.ledger import OPEN
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
    """The jobs, one line each, and why those that failed did.

    Whoever reads it line by line finds the reason at its job and has no width; on a terminal the
    reasons follow below, each once with the numbers of its jobs.
    """
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    reasons = [_reason(entry) for entry in entries]
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("job", "target", "state", "stage", "size", "parity", "KL")
    for title in (*titles, *(() if terminal else ("reason",))):
        table.add_column(title, overflow="fold" if title == "target" else "ellipsis")
    colours = {"published": "green", "running": "cyan", "parked": "red", "quarantined": "red"}
    for entry, reason in zip(entries, reasons, strict=True):
        job = entry.job
        parity = job.facts.get("parity") or {}
        colour = colours.get(entry.state, "yellow")
        table.add_row(
            str(job.id),
            job.target,
            f"[{colour}]{entry.state}[/]",
            "" if entry.state == "published" else job.stage or "",
            size_text(job.facts["output_bytes"]) if "output_bytes" in job.facts else "",
            _number(parity.get("error")),
            _number(parity.get("kl")),
            *(() if terminal else (_plain(reason),)),
        )
    console = Console(highlight=False, width=None if terminal else _UNFOLDED)
    console.print(table)
    if terminal:
        for reason in dict.fromkeys(filter(None, reasons)):
            mine = [str(e.job.id) for e, own in zip(entries, reasons, strict=True) if own == reason]
            named = f"{'job' if len(mine) == 1 else 'jobs'} {', '.join(mine)}"
            console.print(f"\n[bold]{named}[/]: {_plain(reason)}")
        console.print()
    counted = Counter(entry.state for entry in entries)
    each = ", ".join(f"{count} {state}" for state, count in sorted(counted.items()))
    jobs = "1 job" if len(entries) == 1 else f"{len(entries)} jobs"
    console.print(f"{jobs}{': ' if each else ''}{each}")


def _reason(entry: Entry) -> str:
    """Why a job is not published, and when it is looked at again, by this machine's clock."""
    job = entry.job
    if not job.error:
        return ""
    text = f"{job.error_class}: {job.error.splitlines()[0]}"
    if entry.state not in OPEN or job.not_before <= time.time():
        return text
    return text + time.strftime("; again at %Y-%m-%d %H:%M", time.localtime(job.not_before))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else ""
