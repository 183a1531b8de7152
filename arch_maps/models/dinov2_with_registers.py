"""DINOv2 with registers: tokens beside the class token that collect what patches should not."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.vision import dinov2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    tower = root.at(source="", target="", part="vision")
    dinov2.tower(tower, facts, registers=facts.size("num_register_tokens", 4))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    dinov2.spell_config(out, facts)
    out.update(num_register_tokens=int(facts.size("num_register_tokens", 4)))
    out["interpolate_antialias"] = True
    return out


MAP = ArchMap(
    model_type="dinov2_with_registers",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("vision.dinov2",),
    modalities=("image",),
    pipeline_tag="image-feature-extraction",
)
