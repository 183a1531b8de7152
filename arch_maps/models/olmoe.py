"""OLMoE: norms over all query and key heads, and experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(llama.sizes(facts), qk_norm=True, wide_qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 64),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
    )

    def feed_forward(_: int, layer: Mount) -> None:
        layer.linear("mlp.gate", routed.count, s.hidden, kind=Kind.GATE)
        moe.experts(layer / "mlp", routed)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("clip_qkv", None, default=None, why="the runtimes do not clip")
    out = spell.start(config)
    s = _sizes(facts)
    types = ("default", "linear", "yarn")
    moe.spell_config(out, facts, s, max_positions=4096, eps=1e-5, rope_types=types)
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        norm_topk_prob=facts.flag("norm_topk_prob", False),
        attention_bias=s.attention_bias,
        mlp_bias=False,
        rope_traditional=False,
    )
    moe.spell_expert_count(out, moe.expert_count(facts, 64))
    return out


MAP = ArchMap(
    model_type="olmoe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
