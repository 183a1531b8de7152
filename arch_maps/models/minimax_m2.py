"""MiniMax M2: norms over all query and key heads, partial rotation, sigmoid-routed experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_BLOCK = "block_sparse_moe"


def _sizes(facts: Facts) -> llama.Sizes:
    s = llama.sizes(facts, kv_heads=8, head_dim=128)
    return replace(s, qk_norm=True, wide_qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 256),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
        names=("w1", "w3", "w2"),
    )

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer.at(source=layout["experts"], target=_BLOCK)
        block.linear("gate", routed.count, s.hidden, kind=Kind.GATE)
        block.tensor("e_score_correction_bias", routed.count, kind=Kind.STATE)
        moe.experts(block, routed)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so for this type"
    facts.expect("scoring_func", "sigmoid", default="sigmoid", why=why)
    facts.expect("use_qk_norm", True, default=True, why=why)
    facts.expect("qk_norm_type", "per_layer", default="per_layer", why=why)
    facts.expect("use_routing_bias", True, default=True, why=why)
    out = spell.start(config)
    s = _sizes(facts)
    stated = facts.data.get("rotary_dim")
    rotary = 1.0 if stated is None else facts.size("rotary_dim") / int(s.head_dim)
    moe.spell_config(out, facts, s, max_positions=196608, theta=5e6, rotary=rotary)
    moe.spell_expert_count(out, moe.expert_count(facts, 256))
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        rotary_dim=int(int(s.head_dim) * out["partial_rotary_factor"]),
        shared_intermediate_size=0,
        scoring_func="sigmoid",
        use_qk_norm=True,
    )
    return out


MAP = ArchMap(
    model_type="minimax_m2",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"experts": _BLOCK}),
        Layout("fused experts", {"experts": "mlp"}, fused_experts=True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
