"""MiniCPM-V 4.7: 4.6's parts, with the tokens of a picture placed on a canvas."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import minicpmv_qwen
from arch_maps.registry import ArchMap

_MARKERS = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = minicpmv_qwen.spell_config(config, facts, vision_type="minicpmv4_7_vision")
    text = facts.section("text_config")
    text.expect("model_type", "qwen3_5_text", default="qwen3_5_text", why="this map has no experts")
    for name in _MARKERS:
        if type(facts.data.get(name)) is not int:
            facts.problem(f"config.json: {name} must be a token id; pictures are placed by it")
    out["mrope_mode"] = "canvas"
    return out


MAP = ArchMap(
    model_type="minicpmv4_7",
    tensors=minicpmv_qwen.tensors,
    config=_config,
    layouts=minicpmv_qwen.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.qwen3_5", "vision.siglip", "projectors.minicpmv"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
