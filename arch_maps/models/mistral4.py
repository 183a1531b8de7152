"""Mistral 4 text models: latent attention, softmax-routed experts, queries scaled by position."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    sparse = moe.dense_prefix(facts, facts.count("num_hidden_layers"))
    deepseek.latent_lm(root, facts, sparse, fused=layout.fused_experts, correction=False)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=1048576)
    deepseek.spell_rope(out, facts)
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if out["rope_parameters"].get(name) is None:
            facts.problem(f"config.json does not state rope_parameters.{name}")
    deepseek.spell_routing(out, facts, dense=facts.data.get("first_k_dense_replace") or 0)
    out["rope_interleave"] = True
    return out


MAP = ArchMap(
    model_type="mistral4",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-lm",),
    parts=("text.deepseek", "text.mla", "text.moe"),
)
