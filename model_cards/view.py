"""Figures and reports in the words a card uses."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHOWN_RECIPE_CHARS = 300
_CHECK_FIELDS = frozenset({"name", "modality", "runtime", "value", "threshold", "verdict", "note"})
# What people compare between conversions; the rest is in parity.json.
_HEADLINES = ("max_abs", "relative", "kl_mean", "kl_p99", "kl_max", "top1")
_VERDICTS = {"info": "reported"}


class CardError(ValueError):
    """A card cannot be written: the message names the template and line, or the report."""


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
class ParityView:
    """A parity report ready to print."""

    verdict: str
    reference: str
    runtime: str
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
        checks=checks,
    )


def _check_view(check: Mapping[str, Any]) -> CheckView:
    threshold, verdict = check.get("threshold"), str(check.get("verdict", ""))
    metrics = check.get("metrics", {k: v for k, v in check.items() if k not in _CHECK_FIELDS})
    shown = {key: metrics[key] for key in _HEADLINES if key in metrics} or metrics
    return CheckView(
        name=str(check.get("name", "")),
        modality=str(check.get("modality", "")),
        runtime=str(check.get("runtime", "")),
        value=number(check.get("value")),
        threshold="none" if threshold is None else number(threshold),
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


def pairs(mapping: object) -> str:
    """``key value, key value`` of the scalar entries of a mapping; anything else is left out."""
    if not isinstance(mapping, Mapping):
        return str(mapping)
    return ", ".join(
        f"{str(key).replace('_', ' ')} {number(value)}"
        for key, value in mapping.items()
        if isinstance(value, str | int | float)
    )


def number(value: object) -> str:
    """Floats at three significant digits, integers with separators, booleans as yes or no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "not finite"
    return str(value)


def human_bytes(size: int) -> str:
    """``size`` in decimal units, with the exact count when the unit hides it."""
    if size < 1000:
        return f"{size} bytes"
    exponent = min(int(math.log10(size) / 3), 4)
    unit = ("", "kB", "MB", "GB", "TB")[exponent]
    return f"{size / 1000**exponent:.2f} {unit} ({size:,} bytes)"


def recipe_text(recipe: Mapping[str, object]) -> str | None:
    """The recipe as JSON; None when empty or too long for a line (the manifest holds it whole)."""
    text = json.dumps(recipe, default=str, ensure_ascii=False)
    return text if recipe and len(text) <= _SHOWN_RECIPE_CHARS else None
