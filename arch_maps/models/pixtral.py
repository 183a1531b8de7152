"""Pixtral 12B as transformers has it: LLaVA's shape with a Pixtral tower and the Mistral stack."""

from __future__ import annotations

from functools import partial
from typing import Any

from arch_maps.facts import Facts
from arch_maps.projectors import llava, pixtral
from arch_maps.registry import ArchMap


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.section("text_config").expect(
        "model_type", "mistral", default="mistral", why="the runtimes compute no other stack"
    )
    facts.expect("multimodal_projector_bias", True, default=True, why="the runtime has biases")
    out = pixtral.spell_config(config, facts, model_type="pixtral", image_token=32000)
    kind = out["text_config"]["rope_parameters"]["rope_type"]
    if kind not in ("default", "linear"):
        facts.problem("config.json: one runtime computes unscaled or linear positions only")
    return out


MAP = ArchMap(
    model_type="pixtral",
    tensors=partial(pixtral.tensors, merged=False),
    config=_config,
    layouts=llava.PIXTRAL_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "vision.pixtral", "projectors.pixtral"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=("Released as llava; its runtime is pixtral, which config.json names.",),
)
