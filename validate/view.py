"""What a parity page shows, gathered from the content of parity.json and what lies beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from validate.charts import (
    Chart,
    Scatter,
    depth_chart,
    distribution_chart,
    kl_chart,
    pareto_chart,
    position_chart,
)

Json = Mapping[str, Any]
_LETTERS: Final = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}
_LOSS: Final = ("kl_mean", "kl_median", "kl_p90", "kl_p99", "kl_max")


def figure(value: Any) -> str:
    """A number as a reader wants it: three significant digits, whole numbers as such."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


def share(value: Any) -> str:
    """A part of one in per cent."""
    return f"{100 * value:.4g}\u00a0%" if isinstance(value, int | float) else "-"


def runtime_name(value: Any) -> str:
    """The name of a runtime as its package has it."""
    return str(value).replace("_", "-")


def visible(text: str) -> str:
    """A token in which blanks at its ends, tabs and ends of lines can be seen."""
    for letter, sign in _LETTERS.items():
        text = text.replace(letter, sign)
    inner = text.strip(" ")
    if not inner:
        return "\u2423" * len(text) or "\u2205"
    start = len(text) - len(text.lstrip(" "))
    return "\u2423" * start + inner + "\u2423" * (len(text) - start - len(inner))


def tiles(data: Json) -> list[tuple[str, str, str]]:
    """(label, figure, remark) of what a reader looks for first; the worst row of each kind."""
    checks = data["checks"]
    found = []
    for label, names, remark in (
        ("exactness", ("logits", "decode", "hidden"), "largest relative error, text"),
        ("pictures", ("image/logits", "image/decode", "image/hidden"), "largest relative error"),
        ("sounds", ("audio/logits", "audio/decode", "audio/hidden"), "largest relative error"),
        ("videos", ("video/logits", "video/decode"), "largest relative error"),
        ("16-bit noise", ("noise",), "in units of torch's own"),
    ):
        values = [check["value"] for check in checks if check["name"] in names]
        if values:
            found.append((label, figure(_largest(values)), remark))
    losses = [check["metrics"] for check in checks if check["name"] == "loss" and check["metrics"]]
    if losses and all("kl_mean" in metrics for metrics in losses):
        p99, agree = (_largest([m["kl_p99"] for m in losses]), min(m["top1"] for m in losses))
        found.append(
            (
                "loss, KL mean",
                figure(_largest([m["kl_mean"] for m in losses])),
                f"p99 {figure(p99)}, same first choice {100 * agree:.1f}\u00a0%",
            )
        )
    if "conversion" in data:
        made = data["conversion"]
        found.append(("bits per weight", f"{made['bits_per_weight']:.2f}", made["size"]))
    if "acceptance" in data:
        rows = data["acceptance"]["rows"]
        passed = sum(row["verdict"] == "pass" for row in rows)
        applicable = passed + sum(row["verdict"] == "fail" for row in rows)
        found.append(("stock programs", f"{passed} of {applicable}", "rows that apply pass"))
    return found


def _largest(values: list[Any]) -> Any:
    """The worst of JSON figures; text stands for what is not finite, and null for no figure."""
    words = [value for value in values if not isinstance(value, int | float)]
    return words[0] if words else max(values)


def grouped(checks: Sequence[Json]) -> list[tuple[str, list[Json]]]:
    """The rows of each runtime; those of none are the checkpoint's own."""
    groups: dict[str, list[Json]] = {}
    for check in checks:
        groups.setdefault(runtime_name(check["runtime"] or "checkpoint"), []).append(check)
    return list(groups.items())


def layer_charts(checks: Sequence[Json]) -> list[tuple[Json, Chart]]:
    """How the error grows along the depth, for each runtime and kind of input."""
    found = ((check, depth_chart(check)) for check in checks if check["name"] == "modules")
    return [(check, chart) for check, chart in found if chart is not None]


def kl_charts(checks: Sequence[Json]) -> list[tuple[str, Chart]]:
    """The distribution of KL, a line for each kind of input; runtimes of one picture share it."""
    groups: dict[str, list[Json]] = {}
    for check in checks:
        if check["name"] == "loss":
            groups.setdefault(check["runtime"], []).append(check)
    charts: dict[Chart, list[str]] = {}
    for name, rows in groups.items():
        if (chart := kl_chart(rows)) is not None:
            charts.setdefault(chart, []).append(runtime_name(name))
    return [(", ".join(names), chart) for chart, names in charts.items()]


def prompt_charts(checks: Sequence[Json]) -> list[tuple[Json, Chart]]:
    """The same, and the error at each position, with a line for each prompt."""
    found = []
    for check in checks:
        if check["name"] == "loss":
            chart = distribution_chart(check)
        elif check["name"].rpartition("/")[2] in ("logits", "decode"):
            chart = position_chart(check)
        else:
            chart = None
        if chart is not None:
            found.append((check, chart))
    return found


def losses(checks: Sequence[Json]) -> list[dict[str, Any]]:
    """What quantizing cost, a row for each kind of input; runtimes of one figure share a row."""
    rows: dict[str, dict[str, Any]] = {}
    for check in checks:
        metrics = check["metrics"]
        if check["name"] != "loss" or "kl_mean" not in metrics:
            continue
        row = {
            "modality": check["modality"],
            "positions": metrics.get("positions"),
            **{key: metrics.get(key) for key in _LOSS},
            "top1": metrics.get("top1"),
            "ratio": metrics.get("perplexity_ratio"),
            "ratio_error": metrics.get("perplexity_ratio_error"),
            "threshold": check["threshold"],
        }
        key = json.dumps([figure(value) for value in row.values()])
        rows.setdefault(key, {**row, "runtimes": []})["runtimes"].append(
            runtime_name(check["runtime"])
        )
    return list(rows.values())


def choices(checks: Sequence[Json]) -> list[dict[str, Any]]:
    """First choices, prompt by prompt, for each runtime that generates.

    ``rows``: (prompt, its kind) with the share of equal first choices after quantizing and of the
    same weights in torch, and the greedy tokens that are shared. ``parted``: the prompts that have
    positions where they part, and some of these.
    """
    runtimes: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for check in checks:
        kind = {"logits": "exact", "greedy": "greedy", "loss": "loss"}.get(
            check["name"].rpartition("/")[2]
        )
        if kind is None:
            continue
        prompts = runtimes.setdefault(check["runtime"], {})
        for case in check["cases"]:
            row = prompts.setdefault(
                (check["modality"], case["name"]),
                {
                    **{"modality": check["modality"], "prompt": case["name"], "positions": None},
                    **{"exact": None, "loss": None, "greedy": None, "parted": []},
                },
            )
            metrics = case["metrics"]
            if kind == "greedy":
                row[kind] = f"{figure(case['value'])} of {figure(metrics.get('tokens'))}"
            else:
                row[kind] = share(metrics.get("top1"))
                row["positions"] = metrics.get("positions")
            if case.get("partings"):
                row["parted"].append(_parted(kind, case))
    return [
        {
            "runtime": runtime_name(name),
            "rows": list(prompts.values()),
            "quantized": any(row["loss"] for row in prompts.values()),
            "parted": [row for row in prompts.values() if row["parted"]],
        }
        for name, prompts in runtimes.items()
        if any(row["exact"] or row["loss"] for row in prompts.values())
    ]


_PARTED: Final = {
    "loss": ("after quantizing", "original", "this checkpoint"),
    "exact": ("the same weights", "torch", "MLX"),
    "greedy": ("the greedy answer", "torch", "MLX"),
}
"""What was compared, and what the two sides are called."""


def _parted(kind: str, case: Json) -> dict[str, Any]:
    what, one, other = _PARTED[kind]
    metrics = case["metrics"]
    shown, positions = len(case["partings"]), metrics.get("positions", metrics.get("tokens"))
    count = round((1 - metrics["top1"]) * positions) if "top1" in metrics else shown
    return {
        "what": what,
        "sides": (one, other),
        "told": f"{count} of {positions} positions"
        + (f"; the {shown} that were surest" if count > shown else ""),
        "partings": case["partings"],
    }


def kv_rows(study: Json | None) -> list[dict[str, Any]]:
    """The schemes of a KV-cache study, by loss at long context; what failed comes last."""
    if study is None:
        return []
    chosen = study["chosen"]
    rows = [{**chosen, "setting": f"config.json: {chosen['scheme']}"}]
    rows += [{**row, "setting": row["flags"]} for row in study["stock"]]
    failed = [row for row in rows if "error" in row]
    measured = [row for row in rows if "error" not in row]
    return sorted(measured, key=lambda row: float(row["long"]["decode"]["all"]["kl_mean"])) + failed


def size_chart(quality: Json | None) -> Scatter | None:
    """Loss against size of the outputs that were measured together; None below two of them."""
    rows = quality["rows"] if quality else []
    if len(rows) < 2:
        return None
    return pareto_chart(
        [
            (row["name"], row["bits_per_weight"], number(row["kl_mean"]), row["control"])
            for row in rows
        ],
        title="mean KL against bits per weight",
        x_label="bits per weight",
    )


def number(value: Any) -> float:
    """A figure for a chart; text, which stands for what is not finite, as infinity."""
    return value if isinstance(value, int | float) else math.inf


def provenance(data: Json) -> list[tuple[str, str]]:
    """Where a report and its checkpoint come from, as (label, value) rows."""
    facts: list[tuple[str, str]] = []
    made = data.get("conversion")
    if made:
        facts += made["facts"]
    facts.append(("plan", str(data["plan"] or "none given")))
    if data.get("checkpoint"):
        facts.append(("checkpoint, sha256 over all files", str(data["checkpoint"])))
    facts += [(f"reference {key}", str(value)) for key, value in data["reference"].items()]
    for runtime in data["runtime"].get("runtimes", []):
        name = runtime_name(runtime.get("name", "runtime"))
        facts += [(f"{name} {key}", str(v)) for key, v in runtime.items() if key != "name"]
    return facts
