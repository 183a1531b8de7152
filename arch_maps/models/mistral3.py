"""Mistral Small 3.1, 3.2 and Ministral 3: a Pixtral tower whose patches are merged."""

from __future__ import annotations

from functools import partial
from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import llava, pixtral
from arch_maps.registry import ArchMap


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = pixtral.spell_config(config, facts, model_type="mistral3", image_token=10)
    out.update(
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        multimodal_projector_bias=facts.flag("multimodal_projector_bias", False),
    )
    return out


MAP = ArchMap(
    model_type="mistral3",
    tensors=partial(pixtral.tensors, merged=True),
    config=_config,
    layouts=llava.PIXTRAL_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "vision.pixtral", "projectors.pixtral"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
