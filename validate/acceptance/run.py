"""Run the rows of one checkpoint, one after another, and say what came of each."""

import importlib.metadata
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from validate.acceptance import needs
from validate.acceptance.bench import Bench
from validate.acceptance.facts import Facts
from validate.acceptance.faults import known_fault
from validate.acceptance.model import NotApplicable, Outcome, Row, RowFailure
from validate.acceptance.rows import ROWS

_NO_METAL: Final = re.compile(r"\[metal_kernel\]|No Metal back-?end|Metal is not available", re.I)


def accept(
    facts: Facts,
    *,
    only: Sequence[str] = (),
    limit_s: float = 600.0,
    progress: Callable[[Outcome], None] | None = None,
) -> tuple[tuple[Outcome, ...], dict[str, Any]]:
    """The outcome of every row, or of those whose titles contain a text of ``only``; the backend.

    ``limit_s``: how long one program may take, seconds.
    """
    say = progress or (lambda outcome: None)
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="accept-") as folder,
        Bench(facts, Path(folder), limit_s=limit_s) as bench,
    ):
        for row in chosen(only):
            outcome = judge(row, bench)
            outcomes.append(outcome)
            say(outcome)
        backend = describe_backend(bench)
    return tuple(outcomes), backend


def chosen(only: Sequence[str]) -> tuple[Row, ...]:
    """The rows whose titles contain one of the texts; all of them when none is given."""
    return tuple(row for row in ROWS if not only or any(text in row.title for text in only))


def judge(row: Row, bench: Bench) -> Outcome:
    """Run a row where it applies."""
    facts = bench.facts
    reason = needs.writes(facts) or _unknown(row, facts) or row.inapplicable(facts)
    if reason:
        return Outcome(row=row, verdict="not applicable", note=reason)
    bench.commands.clear()
    started = time.monotonic()
    try:
        found = row.run(bench)
        outcome = Outcome(row=row, verdict="pass", note=found.note, metrics=found.metrics)
    except NotApplicable as told:
        outcome = Outcome(row=row, verdict="not applicable", note=str(told))
    except RowFailure as failure:
        outcome = _failed(row, str(failure), bench)
    return replace(
        outcome,
        note=bench.plain(outcome.note),
        commands=tuple(dict.fromkeys(bench.plain(command) for command in bench.commands)),
        seconds=time.monotonic() - started,
    )


def _failed(row: Row, message: str, bench: Bench) -> Outcome:
    """A failed row, or one that needs a backend which is not here, in the runtime's own words."""
    if "cpu" in bench.device and _NO_METAL.search(message):
        reason = f"the CPU backend cannot run it: {message}"
        return Outcome(row=row, verdict="not applicable", note=reason)
    fault = known_fault(row.runtime, row.name, bench.facts.model_type)
    return Outcome(row=row, verdict="fail", note=f"{message}; {fault}" if fault else message)


def _unknown(row: Row, facts: Facts) -> str | None:
    if row.runtime in facts.runtimes:
        return None
    return f"{row.runtime.replace('_', '-')} has no model for {facts.model_type}"


def describe_backend(bench: Bench) -> dict[str, Any]:
    """Versions of what ran, and on what."""
    names = ("mlx", "mlx-lm", "mlx-vlm", "transformers")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": bench.device,
        **{name: importlib.metadata.version(name) for name in names},
    }
