"""Write a parity report: ``parity.json`` for programs, ``parity.html`` for people."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from validate.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    depth_chart,
    distribution_chart,
    gauge,
    position_chart,
)
from validate.checks import Report

TEMPLATES: Final = Path(__file__).parent / "templates"
_HEADINGS: Final = {
    "pass": "Parity holds",
    "fail": "Parity does not hold",
    "unproven": "Parity is unproven",
}
_WORDS: Final = {"pass": "passed", "fail": "failed", "info": "reported"}


def write_report(
    report: Report,
    folder: Path,
    *,
    kv_cache: Mapping[str, Any] | None = None,
    acceptance: Mapping[str, Any] | None = None,
) -> None:
    """Write ``parity.json`` and the self-contained ``parity.html`` into ``folder``.

    ``kv_cache`` is the study of the checkpoint's KV-cache schemes, ``acceptance`` what the stock
    programs did with it, where there are such; the latter is shown on the page alone.
    """
    data: dict[str, Any] = {**report.to_json(), **({"kv_cache": kv_cache} if kv_cache else {})}
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True)
    _replace(folder / "parity.json", text + "\n")
    write_page(data, folder, acceptance=acceptance)


def write_page(
    data: Mapping[str, Any], folder: Path, *, acceptance: Mapping[str, Any] | None
) -> None:
    """Write ``parity.html`` from the content of parity.json and of acceptance.json."""
    shown = {**data, **({"acceptance": acceptance} if acceptance else {})}
    _replace(folder / "parity.html", render_html(shown))


def render_html(data: Mapping[str, Any]) -> str:
    """One page from the content of parity.json: no scripts, nothing fetched, all text escaped."""
    counts = {word: 0 for word in _WORDS}
    for check in data["checks"]:
        counts[check["verdict"]] += 1
    return page(
        "parity.html.j2",
        report=data,
        headings=_HEADINGS,
        counts=[(counts[key], word, key) for key, word in _WORDS.items()],
        tiles=_tiles(data["checks"]),
        groups=_grouped(data["checks"]),
        charts=_charts(data["checks"]),
        facts=_facts(data),
        kv_rows=kv_rows(data.get("kv_cache")),
        gauge=gauge,
        box={"w": WIDTH, "h": HEIGHT, "l": LEFT, "r": RIGHT, "t": TOP, "b": BOTTOM},
    )


def page(template: str, **values: Any) -> str:
    """A template of this package filled in, everything in it escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    return environment.get_template(template).render(**values)


def figure(value: Any) -> str:
    """A number as a reader wants it: three significant digits, whole numbers as such."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


def _tiles(checks: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(label, figure, remark) of what a reader looks for first; the worst row of each kind."""
    tiles = []
    for label, names, remark in (
        ("exactness", ("logits", "decode", "hidden"), "largest relative error, text"),
        ("pictures", ("image/logits", "image/decode", "image/hidden"), "largest relative error"),
        ("sounds", ("audio/logits", "audio/decode", "audio/hidden"), "largest relative error"),
        ("16-bit noise", ("noise",), "in units of torch's own"),
    ):
        values = [check["value"] for check in checks if check["name"] in names]
        if values:
            tiles.append((label, figure(_largest(values)), remark))
    losses = [check["metrics"] for check in checks if check["name"] == "loss" and check["metrics"]]
    if losses and all("kl_mean" in metrics for metrics in losses):
        p99, agree = (_largest([m["kl_p99"] for m in losses]), min(m["top1"] for m in losses))
        tiles.append(
            (
                "loss, KL mean",
                figure(_largest([m["kl_mean"] for m in losses])),
                f"p99 {figure(p99)}, same first choice {100 * agree:.1f} %",
            )
        )
    return tiles


def _largest(values: list[Any]) -> Any:
    """The worst of JSON figures; text stands for what is not finite, and null for no figure."""
    words = [value for value in values if not isinstance(value, int | float)]
    return words[0] if words else max(values)


def _grouped(checks: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for check in checks:
        groups.setdefault(check["runtime"] or "checkpoint", []).append(check)
    return list(groups.items())


def _charts(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = []
    for check in checks:
        if check["name"] == "loss":
            chart = distribution_chart(check)
        elif check["name"] == "modules":
            chart = depth_chart(check)
        elif check["name"].rpartition("/")[2] in ("logits", "decode"):
            chart = position_chart(check)
        else:
            chart = None
        if chart is not None:
            result.append({"check": check, "chart": chart})
    return result


def kv_rows(study: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The schemes of a KV-cache study, by loss at long context; what failed comes last."""
    if study is None:
        return []
    chosen = study["chosen"]
    rows = [{**chosen, "setting": f"config.json: {chosen['scheme']}"}]
    rows += [{**row, "setting": row["flags"]} for row in study["stock"]]
    failed = [row for row in rows if "error" in row]
    measured = [row for row in rows if "error" not in row]
    return sorted(measured, key=lambda row: float(row["long"]["decode"]["all"]["kl_mean"])) + failed


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Provenance as (label, value) rows."""
    facts = [("plan", str(data["plan"] or "none given"))]
    facts += [(f"reference {key}", str(value)) for key, value in data["reference"].items()]
    for runtime in data["runtime"].get("runtimes", []):
        name = runtime.get("name", "runtime")
        facts += [(f"{name} {key}", str(v)) for key, v in runtime.items() if key != "name"]
    return facts


def _replace(path: Path, text: str) -> None:
    # A reader, or an interrupted run, never sees half a report.
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
