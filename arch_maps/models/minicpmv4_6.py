"""MiniCPM-V 4.6: a SigLIP tower with a window merger, and the Qwen3.5 text stack."""

from __future__ import annotations

from functools import partial

from arch_maps.projectors import minicpmv_qwen
from arch_maps.registry import ArchMap

MAP = ArchMap(
    model_type="minicpmv4_6",
    tensors=minicpmv_qwen.tensors,
    config=partial(minicpmv_qwen.spell_config, vision_type="minicpmv4_6_vision"),
    layouts=minicpmv_qwen.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.qwen3_5", "vision.siglip", "projectors.minicpmv"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
