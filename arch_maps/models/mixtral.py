"""Mixtral 8x7B and 8x22B: Mistral's attention with experts in every layer."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_BLOCK = "block_sparse_moe"


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=8)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 8),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
        names=("w1", "w3", "w2"),
    )

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer.at(source=layout["experts"], target=_BLOCK)
        block.linear("gate", routed.count, s.hidden, kind=Kind.GATE)
        moe.experts(block, routed)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(out, facts, s, max_positions=4096 * 32, eps=1e-5, theta=1e6)
    why = "the runtimes divide the hidden size among the heads"
    facts.expect("head_dim", int(s.hidden) // int(s.heads), None, default=None, why=why)
    facts.expect("sliding_window", None, default=None, why="the runtimes attend to everything")
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 2)),
        rope_traditional=False,
    )
    moe.spell_expert_count(out, moe.expert_count(facts, 8))
    return out


MAP = ArchMap(
    model_type="mixtral",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"experts": _BLOCK}),
        Layout("fused experts", {"experts": "mlp"}, fused_experts=True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
