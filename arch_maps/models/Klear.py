"""Klear: Qwen3's attention, sigmoid-routed experts and shared ones, mixed by two coefficients."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, qk_norm=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, e = _sizes(facts), deepseek.routed(facts, fused=False)
    sparse = moe.sparse_layers(facts, s.layers)
    shared = facts.size("n_shared_experts") * e.intermediate

    def feed_forward(index: int, layer: Mount) -> None:
        block = layer / "mlp"
        if not sparse[index]:
            llama.gated_mlp(block, s.hidden, s.intermediate)
            return
        block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
        block.linear("coefficient", 2, s.hidden, bias=True, kind=Kind.GATE)
        block.tensor("expert_bias", e.count, kind=Kind.STATE)
        moe.experts(block, e, target="experts")
        llama.gated_mlp(block / "shared_experts", s.hidden, shared)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    out, s = spell.start(config), _sizes(facts)
    why = "the runtimes divide the hidden size among the heads"
    facts.expect("head_dim", int(s.hidden) // int(s.heads), None, default=None, why=why)
    moe.spell_config(out, facts, s, max_positions=65536)
    out.update(
        num_experts=int(moe.expert_count(facts)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok")),
        n_shared_experts=int(facts.size("n_shared_experts")),
        moe_intermediate_size=int(facts.size("moe_intermediate_size")),
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        decoder_sparse_step=int(facts.size("decoder_sparse_step", 1)),
        mlp_only_layers=facts.data.get("mlp_only_layers") or [],
        attention_bias=s.attention_bias,
    )
    return out


MAP = ArchMap(
    model_type="Klear",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
)
