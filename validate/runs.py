"""Finished runs side by side: what each report says, for a terminal and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from validate.charts import layer_chart, pareto_chart
from validate.report import page
from validate.view import figure, number, runtime_name, share

Json = Mapping[str, Any]
_EXACT: Final = {
    "exactness": ("logits", "decode", "hidden"),
    "pictures": ("image/logits", "image/decode", "image/hidden"),
    "sounds": ("audio/logits", "audio/decode", "audio/hidden"),
    "videos": ("video/logits", "video/decode"),
}
_VERSIONS: Final = ("mlx-dayzero", "mlx", "mlx-vlm", "mlx-lm", "torch", "transformers")
_LEAST_WIDTH: Final = 100
FIGURES: Final = (
    ("verdict", "verdict"),
    ("failed", "failed checks"),
    ("worst", "nearest to its gate"),
    ("exactness", "exactness, text"),
    ("pictures", "exactness, pictures"),
    ("sounds", "exactness, sounds"),
    ("videos", "exactness, videos"),
    ("kl_mean", "KL mean, worst kind of input"),
    ("kl_p99", "KL p99, worst"),
    ("top1", "same first choice, worst"),
    ("perplexity_ratio", "perplexity ratio, worst"),
    ("weights", "weights"),
    ("bits_per_weight", "bits per weight"),
    ("bytes", "size, MB"),
    ("acceptance", "rows that pass in the stock programs"),
)
"""(key, what it is called) of the figures of a run, in the order in which they are shown."""


def run_facts(
    data: Json,
    *,
    name: str,
    conversion: Json | None,
    recorded: Json | None,
    acceptance: Json | None,
    stale: bool,
) -> dict[str, Any]:
    """What is compared of one run, as JSON values.

    ``data`` is the content of parity.json, ``conversion`` how its page tells the conversion,
    ``recorded`` the manifest, ``acceptance`` the content of acceptance.json. ``stale``: the report
    is of other files than those that lie beside it.
    """
    checks = data["checks"]
    failed = [_title(check) for check in checks if check["verdict"] == "fail"]
    losses = [c["metrics"] for c in checks if c["name"] == "loss" and "kl_mean" in c["metrics"]]
    made = conversion or {}
    sizes = recorded["files"].items() if recorded else ()
    return {
        "name": name,
        "release": made.get("repo") or data["reference"].get("folder"),
        "reference": data["reference"].get("folder"),
        "verdict": data["verdict"],
        "stale": stale,
        "failed": failed,
        "worst": _nearest(checks),
        **{key: _worst(checks, names) for key, names in _EXACT.items()},
        **{key: _largest([m.get(key) for m in losses]) for key in ("kl_mean", "kl_p99")},
        "perplexity_ratio": _largest([m.get("perplexity_ratio") for m in losses]),
        "top1": min((m["top1"] for m in losses), default=None),
        "weights": made.get("weights"),
        "bits_per_weight": made.get("bits_per_weight"),
        "bytes": sum(e["bytes"] for n, e in sizes if n.endswith(".safetensors")) or None,
        "acceptance": _accepted(acceptance),
        "versions": _versions(data, recorded),
        "plan": data["plan"],
        "source": {
            key: recorded["source"].get(key) if recorded else None for key in ("repo", "commit")
        },
        "command": made.get("command"),
        "drops": [list(drop) for drop in made.get("drops", ())],
        "layers": _layers(checks),
        "checks": {
            _title(check): {key: check[key] for key in ("value", "threshold", "verdict")}
            for check in checks
        },
    }


def text_of(run: Json, key: str) -> str:
    """A figure of a run as it is shown."""
    value = run[key]
    if key == "failed":
        return ", ".join(value) or "none"
    if key == "worst":
        return (
            f"{value['check']}: {figure(value['value'])} of {figure(value['gate'])}"
            if value
            else "-"
        )
    if key == "top1":
        return share(value)
    if key == "bytes":
        return "-" if value is None else f"{value / 1e6:.2f}"
    if key == "bits_per_weight":
        return "-" if value is None else f"{value:.3f}"
    if key == "perplexity_ratio" and isinstance(value, float):
        return f"{value:.4f}"
    if key == "acceptance":
        return "-" if value is None else f"{value['pass']} of {value['pass'] + value['fail']}"
    if key == "verdict" and run["stale"]:
        return f"{value}, of other files than now"
    return figure(value)


def parted_checks(runs: Sequence[Json]) -> list[tuple[str, list[Json | None]]]:
    """Every check by title, and what each run says of it; None where a run has none."""
    titles = dict.fromkeys(title for run in runs for title in run["checks"])
    return [(title, [run["checks"].get(title) for run in runs]) for title in titles]


def one_release(runs: Sequence[Json]) -> bool:
    """Whether all runs are of one release, as far as their reports tell."""
    return any(
        len({run[key] for run in runs}) == 1 and bool(runs[0][key])
        for key in ("release", "reference")
    )


def print_runs(runs: Sequence[Json]) -> None:
    """The table on standard output: a row for each figure, a column for each run."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    console.width = max(_LEAST_WIDTH, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(_cell(str(run["name"])), overflow="fold")
    shown = [(label, [text_of(run, key) for run in runs]) for key, label in FIGURES]
    shown += [
        (name, [run["versions"].get(name, "-") for run in runs])
        for name in _VERSIONS
        if any(name in run["versions"] for run in runs)
    ]
    for label, cells in shown:
        if set(cells) != {"-"}:
            table.add_row(label, *map(_cell, cells))
    console.print(table)
    if not one_release(runs):
        console.print("These runs are of different releases.")


def _cell(text: str) -> str:
    """``text`` without what would steer a terminal: reports may come from elsewhere."""
    return "".join(c if c.isprintable() else " " for c in text)


def runs_html(runs: Sequence[Json]) -> str:
    """One page: no scripts, nothing fetched, all text escaped."""
    points = [
        (run["name"], run["bits_per_weight"], number(run["kl_mean"]), False)
        if run["bits_per_weight"]
        else (run["name"], 0.0, math.inf, False)  # no dot, and the others keep their colours
        for run in runs
    ]
    figures = [(label, [text_of(run, key) for run in runs], key) for key, label in FIGURES]
    return page(
        "runs.html.j2",
        runs=runs,
        one_release=one_release(runs),
        figures=[row for row in figures if set(row[1]) != {"-"}],
        checks=parted_checks(runs),
        versions=[n for n in _VERSIONS if any(n in run["versions"] for run in runs)],
        sizes=pareto_chart(
            points, title="mean KL against bits per weight", x_label="bits per weight"
        )
        if sum(point[2] < math.inf for point in points) > 1
        else None,
        layers=layer_chart(
            [(run["name"], run["layers"]) for run in runs],
            title="error of each module's output, first text, MLX against torch",
            x_label="modules in the order of the reference",
        ),
    )


def _title(check: Json) -> str:
    told = check["name"].partition("/")[0] == check["modality"]
    parts = (check["name"], "" if told else check["modality"], runtime_name(check["runtime"]))
    return ", ".join(part for part in parts if part)


def _nearest(checks: Sequence[Json]) -> dict[str, Any] | None:
    """The gated row whose value is the largest part of its gate; a failed one before all."""
    for check in checks:  # of a failed one the value may be no number, and the gate nothing
        if check["verdict"] == "fail" and None not in (check["value"], check["threshold"]):
            return {"check": _title(check), "value": check["value"], "gate": check["threshold"]}
    gated = [
        (check["value"] / check["threshold"], check)
        for check in checks
        if isinstance(check["value"], int | float)
        and isinstance(check["threshold"], int | float)
        and check["threshold"] > 0
        and check["verdict"] != "info"
        and check["name"].rpartition("/")[2] != "greedy"
    ]
    if not gated:
        return None
    _, check = max(gated, key=lambda pair: pair[0])
    return {"check": _title(check), "value": check["value"], "gate": check["threshold"]}


def _worst(checks: Sequence[Json], names: Sequence[str]) -> Any:
    return _largest([check["value"] for check in checks if check["name"] in names])


def _largest(values: Sequence[Any]) -> Any:
    """The largest figure; text, which stands for what is not finite, before all."""
    words = [value for value in values if isinstance(value, str)]
    known = [value for value in values if isinstance(value, int | float)]
    return words[0] if words else max(known, default=None)


def _accepted(report: Json | None) -> dict[str, int] | None:
    if report is None:
        return None
    verdicts = [row["verdict"] for row in report["rows"]]
    return {verdict: verdicts.count(verdict) for verdict in ("pass", "fail", "not applicable")}


def _versions(data: Json, recorded: Json | None) -> dict[str, str]:
    found = {key: data["reference"].get(key) for key in ("torch", "transformers")}
    for runtime in data["runtime"].get("runtimes", ()):
        found["mlx"] = runtime.get("mlx")
        found[runtime_name(runtime.get("name"))] = runtime.get("version")
    if recorded:
        found["mlx-dayzero"] = recorded["program"]["version"]
    return {name: str(version) for name, version in found.items() if version}


def _layers(checks: Sequence[Json]) -> list[float]:
    """Errors along the depth of the first traced text; what is not finite is left out."""
    for check in checks:
        if check["name"] == "modules" and check["cases"]:
            series = check["cases"][0]["series"].get("error", ())
            return [value for value in series if isinstance(value, int | float)]
    return []
