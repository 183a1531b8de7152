"""Idefics3: SigLIP tiles, pixel shuffle and the Llama stack."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import idefics3 as parts
from arch_maps.registry import ArchMap


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return parts.spell_config(config, facts, vision_type="idefics3")


MAP = ArchMap(
    model_type="idefics3",
    tensors=parts.tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "projectors.idefics3"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
