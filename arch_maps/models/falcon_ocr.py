"""Falcon-OCR: one decoder that reads patches and tokens alike."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import falcon_ocr
from arch_maps.vision import falcon


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    falcon_ocr.stack(root, facts)
    falcon.patches(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    falcon_ocr.spell_config(out, facts)
    falcon.spell_config(out, facts)
    return out


MAP = ArchMap(
    model_type="falcon_ocr",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.falcon_ocr", "vision.falcon"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm parts the rows of w13 on every load (Model.sanitize), so they are written as the "
        "release has them; what its own converter writes is parted twice.",
    ),
)
