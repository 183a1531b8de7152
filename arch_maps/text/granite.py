"""What Granite's mixtures of experts share: scalings, and two namings of the experts."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Layout

EXPERT_LAYOUTS: Final = (
    Layout(
        "published",
        {},
        {
            "experts.gate_up_proj": "input_linear.weight",
            "experts.down_proj": "output_linear.weight",
        },
        fused_experts=True,
    ),
    Layout(
        "fused experts",
        {},
        {"router.layer.weight": "router.weight"},
        fused_experts=True,
    ),
)


def scales(facts: Facts) -> dict[str, float]:
    """The four scalings as the release states them, the reference's default being one."""
    names = (
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    )
    return {name: facts.number(name, 1.0) for name in names}


def spell_scales(config: dict[str, Any], facts: Facts) -> None:
    """Write the scalings with an embedding multiplier of one, in place.

    mlx-vlm scales the embedding of a prompt but not of the tokens after it. Every reader of the
    residual stream is a norm, so the stream may as well be held divided by that scale.
    """
    scale = facts.number("embedding_multiplier", 1.0)
    if scale <= 0:
        facts.problem(f"config.json: {facts.path}embedding_multiplier must be positive")
        scale = 1.0
    config.update(
        attention_multiplier=facts.number("attention_multiplier", 1.0),
        embedding_multiplier=1.0,
        residual_multiplier=facts.number("residual_multiplier", 1.0) / scale,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6) / scale**2,
        logits_scaling=facts.number("logits_scaling", 1.0),
    )
