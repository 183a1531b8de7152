"""Kolibri 1: four norms a layer, positions in the windows only, sigmoid-weighed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe, windows

_JOINED = {
    "moe.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "post_attn_norm.weight": "post_self_attn_layernorm.weight",
    "post_ffn_norm.weight": "post_mlp_layernorm.weight",
}
"""Names in the memory of transformers 5."""


def _sizes(facts: Facts) -> llama.Sizes:
    every = facts.filled({"intermediate_size": facts.data.get("moe_intermediate_size", 512)})
    return llama.sizes(every, kv_heads=4, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the reference has no such biases")
    s = _sizes(facts)
    e = moe.Experts(
        count=moe.expert_count(facts, 384),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 512),
        fused=layout.fused_experts,
    )
    shared = facts.size("shared_expert_intermediate_size", 512)

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer / "mlp"
        block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
        bias = layer.input("moe.router.expert_bias", e.count)
        block.rule("gate.e_score_correction_bias", bias, Kind.STATE)
        moe.experts(block, e)
        llama.gated_mlp(block / "shared_experts", s.hidden, shared)
        layer.norm("post_attn_norm", s.hidden)
        layer.norm("post_ffn_norm", s.hidden)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(out, facts, s, max_positions=262144)
    moe.spell_expert_count(out, moe.expert_count(facts, 384))
    out.update(
        layer_types=windows.layer_types(facts, s.layers, pattern=5),
        use_sliding_window=True,
        sliding_window=int(facts.size("sliding_window", 513)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 6)),
        norm_topk_prob=facts.flag("norm_topk_prob", False),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 512)),
        attention_bias=False,
        head_dtype="float32",
    )
    return out


MAP = ArchMap(
    model_type="kolibri1",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}), Layout("fused experts", {}, _JOINED, True)),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe"),
)
