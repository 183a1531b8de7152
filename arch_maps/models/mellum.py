"""Mellum 2: Qwen3's mixture of experts, with windows in some layers and positions by layer kind."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe
from arch_maps.text.windows import FULL, SLIDING, layer_types, rope_by_kind


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=4, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    if facts.data.get("num_mtp_layers") or facts.data.get("num_nextn_predict_layers"):
        facts.problem("config.json: num_mtp_layers is set; no layout of such layers is known")
    kinds = facts.data.get("mlp_layer_types") or []
    if not isinstance(kinds, list) or set(kinds) - {"sparse"}:
        facts.problem("config.json: mlp_layer_types must be sparse: the runtimes have no dense MLP")
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 64),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 896),
        fused=layout.fused_experts,
    )

    def feed_forward(_index: int, layer: Mount) -> None:
        layer.linear("mlp.gate", routed.count, s.hidden, kind=Kind.GATE)
        moe.experts(layer / "mlp", routed)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    out, s = spell.start(config), _sizes(facts)
    kinds = layer_types(facts, s.layers, pattern=1)
    if FULL not in kinds:
        facts.problem("config.json: layer_types lacks full_attention; the runtimes look for it")
    full, sliding = rope_by_kind(facts, full_theta=5e5, sliding_theta=1e4)
    ropes = {FULL: full, SLIDING: sliding}
    for kind, settings in ropes.items():
        spell.require_rope_type(facts, settings, allowed=("default", "yarn", "llama3"))
        if settings.get("partial_rotary_factor", 1.0) != 1.0:
            facts.problem(f"config.json: {kind} rotates a part of each head; the runtimes, all")
        ropes[kind] = spell.spell_rope(settings)["rope_parameters"]
    moe.spell_expert_count(out, moe.expert_count(facts, 64))
    out.update(
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 896)),
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        sliding_window=int(facts.size("sliding_window", 1024)),
        layer_types=kinds,
        rope_parameters=ropes,
    )
    return out


MAP = ArchMap(
    model_type="mellum",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
