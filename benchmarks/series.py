"""Contenders measured in turn, so that a drift of the machine's speed meets all of them alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.process import Run, run

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Every contender works from local files; none may spend its time looking for a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A command and the output it makes, which is removed before every run."""

    name: str
    command: Sequence[str | Path]
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """The runs of one contender, one per round."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return median(run.seconds for run in self.runs)

    @property
    def best(self) -> float:
        """Shortest wall time."""
        return min(run.seconds for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        """Largest peak memory of any run."""
        return max(run.peak_bytes for run in self.runs)

    @property
    def read_bytes(self) -> int | None:
        """Most bytes read by any run, where the system tells."""
        known = [run.read_bytes for run in self.runs if run.read_bytes is not None]
        return max(known, default=None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """One contender's time over another's: of each round's pair, and of the best runs."""

    pairs: tuple[float, ...]
    best: float

    @classmethod
    def of(cls, above: Series, below: Series) -> Ratio:
        """``above`` over ``below``, round by round."""
        pairs = zip(above.runs, below.runs, strict=True)
        return cls(tuple(a.seconds / b.seconds for a, b in pairs), above.best / below.best)

    @property
    def median(self) -> float:
        """Median of the rounds' ratios: the figure that is held against a bar."""
        return median(self.pairs)


def in_turn(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    log: Path,
    timeout: float,
    say: Callable[[str], None],
) -> dict[str, Series]:
    """Run every contender once a round; each round starts with the next one.

    Before each run its old output is removed and dirty pages are flushed, outside of the time.
    Raises CommandError when one fails.
    """
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            remove(contender.out)
            os.sync()
            done = run(contender.command, log=log, timeout=timeout, environment=OFFLINE)
            say(
                f"  {contender.name}: {done.seconds:.2f} s, {done.cpu_seconds:.2f} s of CPU, "
                f"{done.peak_bytes / 2**20:.0f} MiB"
            )
            runs[contender.name].append(done)
    return {name: Series(name, tuple(found)) for name, found in runs.items()}


def remove(path: Path | None) -> None:
    """Delete a file or folder of an earlier run."""
    if path is None:
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
