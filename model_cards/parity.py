"""A parity report as a card tells it: the worst of each check first, every row after it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_cards.view import CardError, number, pairs

_CHECK_FIELDS = frozenset({"name", "modality", "runtime", "value", "threshold", "verdict", "note"})
# What people compare between conversions; the rest is in parity.json.
_HEADLINES = ("max_abs", "relative", "kl_mean", "kl_p99", "kl_max", "top1")
_VERDICTS = {"info": "reported"}
_AT_LEAST = ("greedy",)
"""Checks whose gate is the least value."""


@dataclass(frozen=True, kw_only=True)
class CheckView:
    """One row of the parity table, each field ready to print."""

    name: str
    modality: str
    runtime: str
    value: str
    threshold: str
    verdict: str
    details: str


@dataclass(frozen=True, kw_only=True)
class SummaryView:
    """One check over all inputs and runtimes: its worst value."""

    name: str
    inputs: str
    runtimes: str
    worst: str
    threshold: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class LossView:
    """What quantizing costs on one kind of input."""

    inputs: str
    perplexity: str
    kl_mean: str
    kl_p99: str
    top1: str


@dataclass(frozen=True, kw_only=True)
class ParityView:
    """A parity report ready to print."""

    verdict: str
    reference: str
    runtime: str
    summary: tuple[SummaryView, ...]
    losses: tuple[LossView, ...]
    deviations: tuple[str, ...]
    """Faults of a runtime that the other rows are judged without, in words."""
    remarks: tuple[str, ...]
    """How pictures, sounds and videos were prepared where that is not the release's way."""
    checks: tuple[CheckView, ...]


def parity_view(report: Mapping[str, Any] | None, *, plan_hash: str) -> ParityView | None:
    """The report of this very plan, None when there is none; CardError for any other report."""
    if report is None:
        return None
    missing = [key for key in ("verdict", "plan", "checks") if key not in report]
    if missing:
        raise CardError(f"parity.json lacks {', '.join(missing)}: run `convert validate` again.")
    if report["plan"] != plan_hash:
        raise CardError(
            f"parity.json is the report of plan {report['plan']}, but this checkpoint was made "
            f"from plan {plan_hash}: run `convert validate` again."
        )
    checks = tuple(_check_view(check) for check in report["checks"])
    verdict = str(report["verdict"])
    failed = [check.name for check in checks if check.verdict == "fail"]
    if verdict not in ("pass", "fail", "unproven"):
        raise CardError(f"parity.json has the verdict {verdict}: run `convert validate` again.")
    if verdict != "fail" and failed:
        raise CardError(
            f"parity.json says {verdict} although these checks failed: {', '.join(failed)}. "
            "Run `convert validate` again."
        )
    return ParityView(
        verdict=verdict,
        reference=pairs(report.get("reference", {})),
        runtime=_runtimes(report.get("runtime", {})),
        summary=tuple(_summaries(report["checks"])),
        losses=tuple(_losses(report["checks"])),
        deviations=tuple(_deviations(report["checks"])),
        remarks=tuple(_remarks(report["checks"])),
        checks=checks,
    )


def _summaries(checks: Sequence[Mapping[str, Any]]) -> Iterator[SummaryView]:
    """The checks that have a gate, one row for each name, in the order of the report."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        if check.get("verdict") in ("pass", "fail"):
            groups.setdefault(str(check.get("name", "")), []).append(check)
    for name, rows in groups.items():
        worst = _worst(rows)
        failed = sum(row["verdict"] == "fail" for row in rows)
        parted = f"{failed} of {len(rows)} fail" if failed and len(rows) > 1 else None
        yield SummaryView(
            name=name,
            inputs=_listed(row.get("modality") for row in rows),
            runtimes=_listed(_runtime(row) for row in rows),
            worst=number(worst.get("value")),
            threshold=_threshold(worst),
            verdict=parted or str(worst["verdict"]),
        )


def _worst(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A failed row before all, then one whose value is no number, then the largest, or the least
    where that is what the gate is about.
    """

    def badness(row: Mapping[str, Any]) -> tuple[bool, float]:
        value = row.get("value")
        least = str(row.get("name", "")).rpartition("/")[2] in _AT_LEAST
        size = 0.0 if value is None else math.inf
        if isinstance(value, int | float) and math.isfinite(value):
            size = -float(value) if least else float(value)
        return row["verdict"] == "fail", size

    return max(rows, key=badness)


def _losses(checks: Sequence[Mapping[str, Any]]) -> Iterator[LossView]:
    """The loss on each kind of input in the first runtime that has it."""
    told: set[str] = set()
    for check in checks:
        kind, metrics = str(check.get("modality", "")), check.get("metrics") or {}
        if check.get("name") != "loss" or kind in told or "kl_mean" not in metrics:
            continue
        told.add(kind)
        ratio, error = metrics.get("perplexity_ratio"), metrics.get("perplexity_ratio_error")
        top1 = metrics.get("top1")
        yield LossView(
            inputs=kind,
            perplexity=f"{ratio:.4f} ± {error:.4f}"
            if _both_numbers(ratio, error)
            else number(ratio),
            kl_mean=number(metrics["kl_mean"]),
            kl_p99=number(metrics.get("kl_p99")),
            top1=f"{100 * top1:.1f} %" if isinstance(top1, int | float) else "-",
        )


def _both_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _deviations(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for check in checks:
        if check.get("name") == "deviation" and check.get("verdict") == "info":
            yield (
                f"{_where(check)}, where stock outputs are off by {number(check.get('value'))}: "
                f"{check.get('note')}"
            )


def _remarks(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for check in checks:
        prepared = str(check.get("name", "")).endswith("/processor")
        if prepared and check.get("verdict") == "info":
            yield f"{_where(check)}: {check.get('note')}"


def _where(check: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (_runtime(check), str(check.get("modality", "")))))


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _runtime(check: Mapping[str, Any]) -> str:
    return str(check.get("runtime") or "").replace("_", "-")


def _threshold(check: Mapping[str, Any]) -> str:
    gate = check.get("threshold")
    return "none" if gate is None else number(gate)


def _check_view(check: Mapping[str, Any]) -> CheckView:
    verdict = str(check.get("verdict", ""))
    metrics = check.get("metrics", {k: v for k, v in check.items() if k not in _CHECK_FIELDS})
    shown = {key: metrics[key] for key in _HEADLINES if key in metrics} or metrics
    return CheckView(
        name=str(check.get("name", "")),
        modality=str(check.get("modality", "")),
        runtime=_runtime(check),
        value=number(check.get("value")),
        threshold=_threshold(check),
        verdict=_VERDICTS.get(verdict, verdict),
        details="; ".join(part for part in (str(check.get("note", "")), pairs(shown)) if part),
    )


def _runtimes(described: Any) -> str:
    """The runtimes of a report, several of them apart by semicolons."""
    several = described.get("runtimes") if isinstance(described, Mapping) else None
    if not several:
        return pairs(described)
    return "; ".join(
        f"{one.get('name', 'runtime')} {pairs({k: v for k, v in one.items() if k != 'name'})}"
        for one in several
    )
