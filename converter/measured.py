"""quality.json: an output beside others of the same release, as they were measured together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from converter.acceptance import identity, json_text, report_of
from converter.atomic import write_atomic
from converter.execute.folder import MANIFEST, explain
from converter.manifest import read_manifest
from validate.checks import finite

FILE: Final = "quality.json"
_KEPT: Final = (
    *("name", "control", "bytes", "bits_per_weight", "kl_mean", "kl_mean_error", "kl_of_control"),
    *("perplexity_ratio", "perplexity_ratio_error", "top1"),
)
_WITH_PICTURES: Final = ("image", "audio", "video")


def quality_report(out: Path) -> dict[str, Any] | None:
    """What was measured of exactly these files; None where that is not known."""
    return report_of(out, FILE)


def record(
    outputs: Mapping[Path, str], rows: Sequence[Mapping[str, Any]], *, measured: str
) -> dict[Path, dict[str, Any]]:
    """Write quality.json beside each of ``outputs``, which are named in ``rows`` as given.

    Returns what was written. Figures that are not finite are written as text.
    """
    kept = [{key: finite(row[key]) for key in _KEPT if row.get(key) is not None} for row in rows]
    written = {}
    for out, name in outputs.items():
        plan, checkpoint = identity(out)
        report = {
            "plan": plan,
            "checkpoint": checkpoint,
            "measured": measured,
            "rows": [{**row, "this": row["name"] == name} for row in kept],
        }
        with explain(out):
            write_atomic(out / FILE, json_text(report))
        written[out] = report
    return written


def record_variants(outputs: Sequence[Path]) -> None:
    """Outputs of one run side by side, by the loss on the prompts of their parity reports."""
    rows = {out: row for out in outputs if (row := _row(out)) is not None}
    if len(rows) > 1:
        names = {out: str(row["name"]) for out, row in rows.items()}
        ordered = sorted(rows.values(), key=lambda row: row["bytes"])
        record(names, ordered, measured="on the fixed prompts of the parity report, text alone")


def _row(out: Path) -> dict[str, Any] | None:
    """Size and loss of an output; None where it was not held against the original."""
    if not (out / MANIFEST).is_file() or not (out / "parity.json").is_file():
        return None
    manifest = read_manifest(out)
    checks = json.loads((out / "parity.json").read_text(encoding="utf-8"))["checks"]
    losses = [c for c in checks if c["name"] == "loss" and c["modality"] not in _WITH_PICTURES]
    metrics = [c["metrics"] for c in losses if c["runtime"] == losses[0]["runtime"]]
    if not metrics or not all(isinstance(m.get("kl_mean"), int | float) for m in metrics):
        return None
    positions = sum(m["positions"] for m in metrics)
    return {
        "name": out.name,
        "control": False,
        "bytes": sum(e["bytes"] for n, e in manifest.files.items() if n.endswith(".safetensors")),
        "bits_per_weight": manifest.data["bits_per_weight"],
        "kl_mean": sum(m["kl_mean"] * m["positions"] for m in metrics) / positions,
        "top1": sum(m["top1"] * m["positions"] for m in metrics) / positions,
    }
