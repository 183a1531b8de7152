"""Qwen3 mixtures of experts: Qwen3's attention, and experts in all but the dense layers."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=4, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 128),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 768),
        fused=layout.fused_experts,
    )
    sparse = moe.sparse_layers(facts, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            layer.linear("mlp.gate", routed.count, s.hidden, kind=Kind.GATE)
            moe.experts(layer / "mlp", routed)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect(
        "use_sliding_window", False, default=False, why="the runtimes attend to everything"
    )
    out = spell.start(config)
    types = ("default", "linear", "yarn")
    moe.spell_config(out, facts, _sizes(facts), max_positions=32768, rope_types=types)
    moe.note_scaling(out, facts)
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 768)),
        decoder_sparse_step=int(facts.size("decoder_sparse_step", 1)),
        mlp_only_layers=facts.data.get("mlp_only_layers") or [],
        norm_topk_prob=facts.flag("norm_topk_prob", False),
    )
    moe.spell_expert_count(out, moe.expert_count(facts, 128))
    return out


MAP = ArchMap(
    model_type="qwen3_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
