"""Qwen1.5 and Qwen2 mixtures of experts: routed experts beside a gated shared one."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=16, qkv_bias=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    why = "the runtimes have these biases and experts in every layer"
    facts.expect("qkv_bias", True, default=True, why=why)
    facts.expect("decoder_sparse_step", 1, default=1, why=why)
    s = _sizes(facts)
    if facts.data.get("mlp_only_layers"):
        facts.problem(f"config.json: {facts.path}mlp_only_layers is not empty: {why}")
    routed = moe.Experts(
        count=moe.expert_count(facts, 60),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 1408),
        fused=layout.fused_experts,
    )
    shared = facts.size("shared_expert_intermediate_size", 5632)

    def feed_forward(_: int, layer: Mount) -> None:
        moe.gated_shared(layer / "mlp", routed, shared)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes attend to everything"
    facts.expect("use_sliding_window", False, default=False, why=why)
    why = "the runtimes do not normalise the routing weights"
    facts.expect("norm_topk_prob", False, default=False, why=why)
    moe.untied(facts)
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(out, facts, s, max_positions=32768)
    why = "the runtimes divide the hidden size among the heads"
    facts.expect("head_dim", int(s.hidden) // int(s.heads), None, default=None, why=why)
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 4)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 1408)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 5632)),
        rope_traditional=False,
    )
    moe.spell_expert_count(out, moe.expert_count(facts, 60))
    return out


MAP = ArchMap(
    model_type="qwen2_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
