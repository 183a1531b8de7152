"""Granite 3 dense text models: Llama's stack with scaled embeddings, residuals and logits."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, llama.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = llama.sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048)
    # mlx-vlm scales the embedding of a prompt but not of the tokens after it. Every reader of the
    # residual stream is a norm, so the stream may as well be held divided by that scale.
    scale = facts.number("embedding_multiplier", 1.0)
    if scale <= 0:
        facts.problem("config.json: embedding_multiplier must be positive")
        scale = 1.0
    out.update(
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        attention_multiplier=facts.number("attention_multiplier", 1.0),
        embedding_multiplier=1.0,
        residual_multiplier=facts.number("residual_multiplier", 1.0) / scale,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6) / scale**2,
        logits_scaling=facts.number("logits_scaling", 1.0),
    )
    return out


MAP = ArchMap(
    model_type="granite",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=(
        "mlx-vlm drops embedding_multiplier in single-token steps; config.json states the same "
        "model with a multiplier of one.",
    ),
)
