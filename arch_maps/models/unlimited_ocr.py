"""Unlimited-OCR: DeepSeek-OCR's parts, with a window over what has been generated."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import deepseek_ocr
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.vision import deepencoder

_OUT = 1024
_WINDOW = 128


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    deepseek_ocr.text(root, facts)
    deepseek_ocr.projector(root, facts, newline=True)
    seen = root.at(source="model", target="", part="vision")
    deepencoder.sam(seen / "sam_model", _OUT)
    vision = facts.section("vision_config")
    deepencoder.clip(seen / "vision_model", vision, patches=layout["patches"] == "kept")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = deepseek_ocr.spell_config(config, facts, model_type="unlimited_ocr")
    vision = facts.section("vision_config")
    deepencoder.expect_sam(vision)
    deepencoder.spell_clip(out["vision_config"], vision)
    text = deepseek_ocr.text_facts(facts)
    window = int(text.size("sliding_window", facts.data.get("sliding_window", _WINDOW)))
    for section in (out["text_config"], out["language_config"]):
        section.update(sliding_window=window, sliding_window_size=window)
    return out


MAP = ArchMap(
    model_type="unlimited_ocr",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"patches": "kept"}),
        Layout("transformers 5", {"patches": "left out"}),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "vision.deepencoder", "projectors.deepseek_ocr"),
    modalities=("text",),
    pipeline_tag="image-text-to-text",
    remarks=(
        "Pictures are not judged: mlx-vlm computes the exact GELU in the CLIP tower (vision.MLP), "
        "where the release has x * sigmoid(1.702 x), so they are off.",
    ),
)
