"""DeepSeek V2, V2.5 and the Lite releases: latent attention and softmax-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    sparse = moe.dense_prefix(facts, facts.count("num_hidden_layers"))
    fused = layout.fused_experts
    deepseek.latent_lm(root, facts, sparse, fused=fused, absorbed=False, correction=False)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=2048)
    deepseek.spell_rope(out, facts)
    if out["rope_parameters"]["rope_type"] != "yarn":
        facts.problem(
            f"config.json: {facts.path}rope_type must be yarn: the runtimes know no other"
        )
    deepseek.spell_routing(
        out, facts, dense=facts.data.get("first_k_dense_replace") or 0, normalised=False
    )
    why = "the runtimes route by a softmax and do not normalise"
    facts.expect("scoring_func", "softmax", default="softmax", why=why)
    facts.expect("norm_topk_prob", False, default=False, why=why)
    facts.expect("topk_method", "greedy", "group_limited_greedy", default="greedy", why=why)
    out["topk_method"] = facts.data.get("topk_method", "greedy")
    return out


MAP = ArchMap(
    model_type="deepseek_v2",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.moe"),
)
