"""Command A Vision: SigLIP tiles, pixel shuffle and Cohere's stack with windows."""

from __future__ import annotations

from functools import partial

from arch_maps.projectors import aya_vision as parts
from arch_maps.projectors import llava
from arch_maps.registry import ArchMap

_INTERMEDIATE = 36864

MAP = ArchMap(
    model_type="cohere2_vision",
    tensors=partial(parts.tensors, intermediate=_INTERMEDIATE, normed=False),
    config=partial(parts.spell_config, intermediate=_INTERMEDIATE),
    layouts=llava.NESTED_LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.cohere", "vision.siglip", "projectors.aya_vision"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 leaves out the tower's last norm: pictures come out wrong.",
        "transformers' class leaves out Cohere's logit_scale; the comparison puts it back.",
    ),
)
