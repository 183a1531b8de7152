"""DeepSeek-OCR-2, published as ``deepseek_vl_v2``: SAM, then Qwen2 layers with learned queries."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import deepseek_ocr
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.vision import deepencoder

_OUT = 896


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    deepseek_ocr.text(root, facts)
    deepseek_ocr.projector(root, facts, newline=False)
    seen = root.at(source="model", target="", part="vision")
    deepencoder.sam(seen / "sam_model", _OUT)
    encoder = seen.at(source="qwen2_model", target="vision_model.qwen2_encoder")
    deepencoder.qwen(encoder, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = deepseek_ocr.spell_config(config, facts, model_type="deepseekocr_2")
    deepencoder.expect_sam(facts.section("vision_config"))
    out["vision_config"].update(model_type="vision", hidden_size=_OUT)
    return out


MAP = ArchMap(
    model_type="deepseekocr_2",
    tensors=_tensors,
    config=_config,
    layouts=deepseek_ocr.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "vision.deepencoder", "projectors.deepseek_ocr"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
