"""The page of an output: drawn anew from all that lies beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from converter.acceptance import acceptance_report
from converter.errors import ConvertError
from converter.execute.folder import MANIFEST, explain
from converter.manifest import read_manifest
from converter.measured import quality_report
from converter.ui import collapsed, quantization_text, size_text


def draw_page(
    out: Path,
    *,
    acceptance: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
) -> None:
    """Write parity.html and its charts from the reports in ``out``; nothing without parity.json.

    ``acceptance`` rows and a comparison of ``quality`` are those that were just made, or what lies
    in the folder and is of exactly these files.
    """
    from validate.report import JSON, write_page

    if not (out / JSON).is_file():
        return
    data: dict[str, Any] = json.loads((out / JSON).read_text(encoding="utf-8"))
    beside: dict[str, Any] = {"acceptance": acceptance, "quality": quality}
    for name, report in (("acceptance", acceptance_report), ("quality", quality_report)):
        with suppress(ConvertError):  # a damaged one ends no proof; uploading it is refused
            beside[name] = beside[name] or report(out)
    if (out / MANIFEST).is_file():
        beside["conversion"] = conversion(out)
    with explain(out):
        write_page({**data, **{key: value for key, value in beside.items() if value}}, out)


def conversion(out: Path) -> dict[str, Any]:
    """How an output was made, as its page tells it."""
    manifest = read_manifest(out)
    data = manifest.data
    source = data["source"]
    size = sum(e["bytes"] for n, e in manifest.files.items() if n.endswith(".safetensors"))
    return {
        "repo": source.get("repo"),
        "weights": quantization_text(data) or "not quantized",
        "size": size_text(size),
        "bits_per_weight": data["bits_per_weight"],
        "command": data["command"],
        "drops": collapsed((drop["name"], drop["reason"]) for drop in data["drops"]),
        "notes": list(data["notes"]),
        "sources": [
            (name, pair[1], pair[0]) for name, pair in sorted((source.get("files") or {}).items())
        ],
        "files": [(name, e["bytes"], e["sha256"]) for name, e in sorted(manifest.files.items())],
        "facts": list(_facts(data, source)),
    }


def _facts(data: Mapping[str, Any], source: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, label in (("repo", "source"), ("commit", "source commit"), ("adapter", "adapter")):
        if source.get(key):
            yield label, _plain(source[key])
    yield "model type", f"{data['model_type']}, {data['layout']} layout"
    yield "parameters", f"{data['parameters']:,}"
    if "map" in data:
        yield "map", _plain(data["map"])
    if "decoding" in data:
        yield "decoded from", _plain({k: v for k, v in data["decoding"].items() if k != "became"})
    yield "recipe", _plain(data["recipe"])
    yield "made with", ", ".join(f"{name} {version}" for name, version in data["versions"].items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
