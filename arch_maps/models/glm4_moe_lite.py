"""GLM 4.7 Flash: latent attention and sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe


def _dense(facts: Facts) -> int:
    """Dense first layers; the reference takes one where the config lists no kinds."""
    kinds = facts.data.get("mlp_layer_types")
    if kinds is None:
        facts.expect("first_k_dense_replace", 1, default=1, why="the reference has one dense layer")
        return 1
    dense = int(kinds.count("dense"))
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        facts.problem(
            f"config.json: {facts.path}mlp_layer_types must name the dense layers first; the "
            "runtimes have them nowhere else"
        )
    return dense


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    dense = _dense(facts)
    sparse = [index >= dense for index in range(facts.count("num_hidden_layers"))]
    deepseek.latent_lm(root, facts, sparse, fused=layout.fused_experts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=202752, eps=1e-5)
    deepseek.spell_rope(out, facts)
    deepseek.spell_routing(out, facts, dense=_dense(facts))
    deepseek.sigmoid_routing(out, facts)
    out.update(partial_rotary_factor=1.0, num_nextn_predict_layers=0)
    return out


MAP = ArchMap(
    model_type="glm4_moe_lite",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.moe"),
)
