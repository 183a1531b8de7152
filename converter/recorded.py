"""What finished outputs tell of how they were made, for whoever goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.errors import ConvertError
from converter.execute.folder import MANIFEST
from converter.losses import measurable
from converter.manifest import read_manifest
from converter.plan.model import Plan
from converter.plan.options import Options
from converter.release import Release
from quant.allocate import Allocation
from quant.recipe import QuantSpec


def recorded_plan(
    draft: Plan, out: Path, content: str, build: Callable[[Options], Plan]
) -> Plan | None:
    """The plan that ``out`` was made by, if that is of the same ``draft`` and weights; else None.

    ``content`` tells the weights from any others. ``build`` makes a plan of the options that the
    output tells of; only the very plan of the output counts, so nothing is taken on trust.
    """
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(out)
        same = manifest.data.get("draft") == draft.hash and manifest.data.get("content") == content
        options = _options(draft, out, manifest.data["recipe"]) if same else None
    except (ConvertError, OSError, ValueError, LookupError, TypeError):
        return None  # a damaged output, which is nobody's
    if options is None:
        return None
    plan = replace(build(options), draft=draft.hash)
    return plan if plan.hash == manifest.plan else None


def kept_facts(release: Release) -> dict[str, Any]:
    """What an MLX checkpoint's manifest remembers of the release it was made from."""
    root = release.root
    if root is None or not (root / MANIFEST).is_file():
        return {}
    manifest = read_manifest(root)
    data = manifest.data
    return {
        "torch_config": data.get("source_config"),
        "layout": data.get("layout"),
        "rotated": manifest.rotated,
        "restore": [d["name"] for d in data.get("drops", ()) if d.get("same_as")],
    }


def _options(draft: Plan, out: Path, recipe: Mapping[str, Any]) -> Options:
    quantization = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization"]
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    told, method = recipe["allocation"], recipe["quantization"]["method"]
    base = _spec(quantization, method)
    modules = [output.rule.module for output in measurable(draft)]
    plain = {module for module in modules if f"{module}.scales" not in index["weight_map"]}
    allocation = Allocation(
        specs={
            module: None if module in plain else _spec(quantization.get(module, base), method)
            for module in modules
        },
        base=base,
        basis=told["basis"],
        losses=told["losses"],
        expected=told["expected"],
    )
    return replace(draft.options, quant=base, allocation=allocation)


def _spec(entry: Mapping[str, Any] | QuantSpec, method: Any) -> QuantSpec:
    if isinstance(entry, QuantSpec):
        return entry
    return QuantSpec(entry["mode"], entry["bits"], entry["group_size"], method)
