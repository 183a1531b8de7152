"""DINOv2: pictures to patch states; the training heads are not released."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.vision import dinov2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    tower = root.at(source="", target="", part="vision")
    dinov2.tower(tower, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    dinov2.spell_config(out, facts)
    out.update(num_register_tokens=0, interpolate_antialias=False)
    return out


MAP = ArchMap(
    model_type="dinov2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("vision.dinov2",),
    modalities=("image",),
    pipeline_tag="image-feature-extraction",
)
