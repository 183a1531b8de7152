"""Granite 3 mixtures of experts: Granite's scalings with experts in every layer."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import granite, llama, moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = llama.sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 8), hidden=s.hidden, intermediate=s.intermediate, fused=True
    )

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer / "block_sparse_moe"
        block.linear("router.layer", routed.count, s.hidden, kind=Kind.GATE)
        moe.experts(block, routed)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = llama.sizes(facts)
    moe.spell_config(out, facts, s, max_positions=2048)
    granite.spell_scales(out, facts)
    moe.spell_expert_count(out, moe.expert_count(facts, 8))
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 2)),
        attention_bias=s.attention_bias,
    )
    return out


MAP = ArchMap(
    model_type="granitemoe",
    tensors=_tensors,
    config=_config,
    layouts=granite.EXPERT_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
    remarks=(
        "mlx-vlm drops embedding_multiplier in single-token steps; config.json states the same "
        "model with a multiplier of one.",
    ),
)
