"""Which matrices the calibrated methods can serve, decided from the rules alone."""

from __future__ import annotations

from dataclasses import replace

from arch_maps.ops import exact
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Rule
from quant.calibrate.text import Calibration
from quant.recipe import CALIBRATED, QuantSpec


def unseen_pictures(calibration: Calibration, arch: ArchMap) -> list[str]:
    """What is wrong with a calibration set that has pictures for a release without eyes."""
    if not calibration.pictures or "image" in arch.modalities:
        return []
    return [
        f"--calibration-data: holds pictures, which {arch.model_type} does not take; give a folder "
        "of text alone"
    ]


def calibrated_spec(rule: Rule, spec: QuantSpec) -> tuple[QuantSpec, str]:
    """The spec that calibration can serve for a rule, and why where it is "search" instead."""
    if spec.method not in CALIBRATED:
        return spec, ""
    if rule.kind is Kind.EMBEDDING and not rule.tied:
        reason = "embeddings that are only looked up, where all columns count alike"
    elif not exact(rule.expr) or len(rule.expr.shape) not in (2, 3):
        reason = "matrices that are computed from the release's tensors, not only moved"
    else:
        return spec, ""
    return replace(spec, method="search"), reason
