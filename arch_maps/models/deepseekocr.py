"""DeepSeek-OCR, published as ``deepseek_vl_v2``: SAM and CLIP in a row, DeepSeek V2's experts."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import deepseek_ocr
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.vision import deepencoder

_OUT = 1024


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    deepseek_ocr.text(root, facts)
    deepseek_ocr.projector(root, facts, newline=True)
    seen = root.at(source="model", target="", part="vision")
    deepencoder.sam(seen / "sam_model", _OUT)
    deepencoder.clip(seen / "vision_model", facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = deepseek_ocr.spell_config(config, facts, model_type="deepseekocr")
    vision = facts.section("vision_config")
    deepencoder.expect_sam(vision)
    deepencoder.spell_clip(out["vision_config"], vision)
    return out


MAP = ArchMap(
    model_type="deepseekocr",
    tensors=_tensors,
    config=_config,
    layouts=deepseek_ocr.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "vision.deepencoder", "projectors.deepseek_ocr"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm computes the exact GELU in the CLIP tower (vision.MLP), where the release's code "
        "has x * sigmoid(1.702 x), so pictures are off.",
    ),
)
