"""DeepSeek V3, R1 and what shares their code: latent attention and sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe

_LAYER_LIMIT = 61
"""The runtimes discard what the first release calls layer 61: its further-token layer."""


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    sparse = moe.dense_prefix(facts, facts.count("num_hidden_layers"))
    deepseek.latent_lm(root, facts, sparse, fused=layout.fused_experts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if facts.count("num_hidden_layers") > _LAYER_LIMIT:
        facts.problem(
            f"config.json: {facts.path}num_hidden_layers exceeds {_LAYER_LIMIT}: the runtimes "
            f"discard layer {_LAYER_LIMIT} of this type"
        )
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=4096)
    deepseek.spell_rope(out, facts)
    deepseek.spell_routing(out, facts, dense=facts.data.get("first_k_dense_replace") or 0)
    deepseek.sigmoid_routing(out, facts)
    return out


MAP = ArchMap(
    model_type="deepseek_v3",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.moe"),
)
