"""Write a parity report: ``parity.json`` for programs, ``parity.html`` and charts for people."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from validate import view
from validate.chart_files import chart_png, chart_svg
from validate.charts import BOX, COLOURS, DARK_COLOURS, DASHES, gauge
from validate.checks import NOT_COMPARED, Report

TEMPLATES: Final = Path(__file__).parent / "templates"
JSON: Final = "parity.json"
PAGE: Final = "parity.html"
IMAGES: Final = {
    "parity-layers": "Error by layer, MLX against torch",
    "parity-kl": "Loss of quantizing, KL from the original",
}
"""Charts beside the page, each as .svg and .png, by name and by what they show."""
REPORT_FILES: Final = (
    *(JSON, PAGE),
    *(f"{name}.{kind}" for name in IMAGES for kind in ("svg", "png")),
)
"""Everything that a report is written to."""
_HEADINGS: Final = {
    "pass": "Parity holds",
    "fail": "Parity does not hold",
    "unproven": "Parity is unproven",
}
_MEANINGS: Final = {
    "pass": "The stock MLX runtime computes what the release computes in torch from these weights:",
    "fail": "Something here is not what the release computes, and nothing is published:",
    "unproven": f"This checkpoint was {NOT_COMPARED}:",
}
_WORDS: Final = {"pass": "passed", "fail": "failed", "info": "reported"}
_SECTIONS: Final = {
    "layers": "Error by layer",
    "loss": "Loss of quantizing",
    "choices": "First choices by prompt",
    "sizes": "Size against loss",
    "kv": "KV cache",
    "acceptance": "Runtime acceptance",
    "drops": "What was left out",
    "checks": "Every check",
    "provenance": "Provenance",
}


def write_json(
    report: Report, folder: Path, *, checkpoint: str | None, kv_cache: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write ``parity.json`` into ``folder``; its content.

    ``checkpoint`` is the hash over the files that the report vouches for, ``kv_cache`` the study of
    the checkpoint's KV-cache schemes, where there are such.
    """
    data: dict[str, Any] = {
        **report.to_json(),
        **({"kv_cache": kv_cache} if kv_cache else {}),
        "checkpoint": checkpoint,
    }
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=True)
    _replace(folder / JSON, text.encode() + b"\n")
    return data


def write_page(data: Mapping[str, Any], folder: Path) -> None:
    """Write ``parity.html`` and the charts, and take away charts that there are none of any more.

    ``data`` is the content of parity.json; beside it may stand ``acceptance`` (of
    acceptance.json), ``quality`` (of quality.json) and ``conversion`` (how the output was made).
    """
    _replace(folder / PAGE, render_html(data).encode())
    for name, image in images(data).items():
        if image is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _replace(folder / name, image)


def images(data: Mapping[str, Any]) -> dict[str, bytes | None]:
    """The files of the two main charts: of the first runtime, and of text where there is text."""
    layers = view.layer_charts(data["checks"])
    kl = view.kl_charts(data["checks"])
    charts = {
        "parity-layers": layers[0][1] if layers else None,
        "parity-kl": kl[0][1] if kl else None,
    }
    found: dict[str, bytes | None] = {}
    for name, title in IMAGES.items():
        chart = charts[name]
        found[f"{name}.svg"] = chart_svg(title, chart).encode() if chart else None
        found[f"{name}.png"] = chart_png(title, chart) if chart else None
    return found


def render_html(data: Mapping[str, Any]) -> str:
    """One page from what ``write_page`` takes: no scripts, nothing fetched, all text escaped."""
    checks = data["checks"]
    counts = {word: 0 for word in _WORDS}
    for check in checks:
        counts[check["verdict"]] += 1
    made = data.get("conversion")
    shown = {
        "layers": view.layer_charts(checks),
        "kl": view.kl_charts(checks),
        "losses": view.losses(checks),
        "choices": view.choices(checks),
        "sizes": view.size_chart(data.get("quality")),
        "kv_rows": view.kv_rows(data.get("kv_cache")),
        "groups": view.grouped(checks),
    }
    there = {
        **shown,
        "loss": shown["kl"] or shown["losses"],
        "sizes": "quality" in data,
        "kv": shown["kv_rows"],
        "acceptance": made or "acceptance" in data,
        "drops": made,
        "checks": checks,
        "provenance": True,
    }
    return page(
        "parity.html.j2",
        report=data,
        subject=(made and made["repo"]) or data["reference"].get("folder") or "MLX checkpoint",
        made=made,
        headings=_HEADINGS,
        meanings=_MEANINGS,
        counts=[(counts[key], word, key) for key, word in _WORDS.items()],
        tiles=view.tiles(data),
        contents=[(key, title) for key, title in _SECTIONS.items() if there[key]],
        charts=view.prompt_charts(checks),
        facts=view.provenance(data),
        gauge=gauge,
        **shown,
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
    environment.globals |= {"box": BOX, "colours": COLOURS, "dark": DARK_COLOURS, "dashes": DASHES}
    environment.filters |= {
        "figure": view.figure,
        "runtime": view.runtime_name,
        "share": view.share,
        "visible": view.visible,
    }
    return environment.get_template(template).render(**values)


def _replace(path: Path, content: bytes) -> None:
    # A reader, or an interrupted run, never sees half a report.
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(content)
    os.replace(draft, path)
