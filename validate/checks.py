"""What a parity run states: checks with a value, a threshold and a verdict, and the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Verdict = Literal["pass", "fail", "info"]
Outcome = Literal["pass", "fail", "unproven"]
EXACT: Final = 1e-4
"""Gate on max |logit difference| / max |logit| when both sides compute in float32."""
OUTPUTS: Final = (
    "logits",
    "image/logits",
    "audio/logits",
    "hidden",
    "image/hidden",
    "audio/hidden",
    "drafted",
)
REFERENCE: Final = "reference"
"""Name of the row that says why there was no torch class to compare with."""
NOT_COMPARED: Final = "not compared with the torch reference"
"""What a report without one, its card and its manifest say."""
NOISE: Final = 2.0
"""Gate on the error of computing in 16 bits, in units of torch's own."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """One position at which another token comes first."""

    position: int
    """Index of the token after which the choice is made; a greedy answer counts from its start."""
    before: str
    """The end of the text up to there; empty where it is not known."""
    wanted: str
    """The token that the reference ranks first."""
    got: str
    """The token that the other ranks first."""
    lead: float
    """By how many nats the reference prefers its own to the other's."""


@dataclass(frozen=True)
class CaseResult:
    """One prompt of a check: its own figures, and series over positions for the charts."""

    name: str
    value: float
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    """What the places of the series are called, where they are no positions."""
    partings: Sequence[Parting] = ()
    """Where the first choices differ, some of the places."""


@dataclass(frozen=True)
class Check:
    """One row of the report. ``info`` rows are measured and not gated."""

    name: str
    modality: str
    verdict: Verdict
    runtime: str = ""
    value: float | None = None
    threshold: float | None = None
    note: str = ""
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    cases: tuple[CaseResult, ...] = ()

    @property
    def proves_outputs(self) -> bool:
        """Whether this row is a passed comparison of what the model computes."""
        return self.verdict == "pass" and self.name in OUTPUTS

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values; what is not finite becomes a string."""
        return {
            "name": self.name,
            "modality": self.modality,
            "runtime": self.runtime,
            "value": finite(self.value),
            "threshold": finite(self.threshold),
            "verdict": self.verdict,
            "note": self.note,
            "metrics": finite(dict(self.metrics)),
            "cases": [
                {
                    "name": case.name,
                    "value": finite(case.value),
                    "metrics": finite(dict(case.metrics)),
                    "series": finite({k: [_rounded(v) for v in s] for k, s in case.series.items()}),
                    **({"labels": list(case.labels)} if case.labels else {}),
                    **_told(case.partings),
                }
                for case in self.cases
            ],
        }


@dataclass(frozen=True)
class Report:
    """The outcome of one parity run."""

    plan: str | None
    reference: Mapping[str, Any]
    runtime: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Outcome:
        """``pass`` when the outputs were compared and no check fails.

        ``unproven``: no check fails, and a row says that there was nothing to compare with.
        """
        if any(check.verdict == "fail" for check in self.checks):
            return "fail"
        if any(check.proves_outputs for check in self.checks):
            return "pass"
        return "unproven" if any(check.name == REFERENCE for check in self.checks) else "fail"

    def to_json(self) -> dict[str, Any]:
        """The content of parity.json."""
        return {
            "verdict": self.verdict,
            "plan": self.plan,
            "reference": finite(dict(self.reference)),
            "runtime": finite(dict(self.runtime)),
            "checks": [check.to_json() for check in self.checks],
        }


def at_most(value: float, threshold: float | None) -> Verdict:
    """``pass`` when value <= threshold; NaN and infinity fail; no threshold: ``info``."""
    if threshold is None:
        return "info" if math.isfinite(value) else "fail"
    return "pass" if math.isfinite(value) and value <= threshold else "fail"


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity as a string, at any depth, so that JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _told(partings: Sequence[Parting]) -> dict[str, Any]:
    told = [{**asdict(one), "lead": finite(_rounded(one.lead))} for one in partings]
    return {"partings": told} if told else {}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
