"""Aya Vision: SigLIP tiles, pixel shuffle behind a norm, and Cohere's stack with windows."""

from __future__ import annotations

from functools import partial
from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import aya_vision as parts
from arch_maps.projectors import llava
from arch_maps.registry import ArchMap


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = parts.spell_config(config, facts, intermediate=None)
    out["adapter_layer_norm_eps"] = facts.number("adapter_layer_norm_eps", 1e-6)
    return out


MAP = ArchMap(
    model_type="aya_vision",
    tensors=partial(parts.tensors, intermediate=None, normed=True),
    config=_config,
    layouts=llava.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.cohere", "vision.siglip", "projectors.aya_vision"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=("transformers' class leaves out Cohere's logit_scale; the comparison puts it back.",),
)
