"""What an acceptance run states: rows with a verdict and a reason, and the report of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from validate.checks import finite

if TYPE_CHECKING:
    from validate.acceptance.bench import Bench
    from validate.acceptance.facts import Facts

Verdict = Literal["pass", "fail", "not applicable"]
SCHEMA: Final = 1
"""Version of acceptance.json; raised when a reader of the old one would misread the new one."""
Need = Callable[["Facts"], "str | None"]
"""Why a row does not apply to a checkpoint, in words; None where it does."""


class RowFailure(ValueError):
    """A row is not met; the message is the runtime's own error, or says what came out instead."""


class NotApplicable(Exception):
    """Only the runtime itself could tell that a row does not apply; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a passed row saw."""

    note: str
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing people do with a checkpoint, and how it is judged."""

    name: str
    runtime: str
    """``mlx_vlm`` or ``mlx_lm``."""
    rule: str
    """What passing means, in one sentence."""
    run: Callable[["Bench"], Found]
    needs: tuple[Need, ...] = ()

    @property
    def title(self) -> str:
        """Name of the row as the command line takes it, such as ``mlx-vlm: server health``."""
        return f"{self.runtime.replace('_', '-')}: {self.name}"

    def inapplicable(self, facts: "Facts") -> str | None:
        """The first reason why the row does not apply; None where it does."""
        return next((reason for need in self.needs if (reason := need(facts))), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row's verdict on one checkpoint."""

    row: Row
    verdict: Verdict
    note: str
    commands: tuple[str, ...] = ()
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {
            "name": self.row.name,
            "runtime": self.row.runtime,
            "verdict": self.verdict,
            "note": self.note,
            "rule": self.row.rule,
            "commands": list(self.commands),
            "metrics": finite(dict(self.metrics)),
            "seconds": round(self.seconds, 1),
        }


def report_json(
    outcomes: Sequence[Outcome],
    *,
    plan: str | None,
    checkpoint: str | None,
    backend: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of acceptance.json."""
    return {
        "schema": SCHEMA,
        "verdict": verdict_of(outcome.verdict for outcome in outcomes),
        "plan": plan,
        "checkpoint": checkpoint,
        "backend": dict(backend),
        "rows": [outcome.to_json() for outcome in outcomes],
    }


def verdict_of(verdicts: Iterable[str]) -> str:
    """``pass`` when no applicable row fails and one passes."""
    seen = set(verdicts)
    return "fail" if "fail" in seen or "pass" not in seen else "pass"
