"""Laguna: as many heads as a layer's kind asks for, gated outputs, sigmoid-routed experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe, windows

_FULL = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
_SLIDING = {"rope_theta": 1e4, "partial_rotary_factor": 1.0}
_UNREAD = frozenset({"truncate"})


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=8, head_dim=128, qk_norm=True)


def _heads(facts: Facts, s: llama.Sizes) -> list[int]:
    """Query heads of each layer."""
    listed = facts.data.get("num_attention_heads_per_layer") or [int(s.heads)] * s.layers
    if len(listed) != s.layers or any(type(n) is not int or n % int(s.kv_heads) for n in listed):
        facts.problem(
            f"config.json: {facts.path}num_attention_heads_per_layer must list {s.layers} "
            f"multiples of num_key_value_heads ({int(s.kv_heads)})"
        )
        return [int(s.heads)] * s.layers
    return list(listed)


def _sparse(facts: Facts, layers: int) -> list[bool]:
    kinds = facts.data.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    if len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        facts.problem(f"config.json: {facts.path}mlp_layer_types must list {layers} layers")
        return [True] * layers
    return [kind == "sparse" for kind in kinds]


def _kinds(facts: Facts, layers: int) -> list[str]:
    kinds = windows.layer_types(facts, layers, pattern=1)
    if windows.FULL not in kinds:
        facts.problem(f"config.json: {facts.path}layer_types must have full attention somewhere")
    return kinds


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    heads, sparse = _heads(facts, s), _sparse(facts, s.layers)
    e = moe.Experts(
        count=moe.expert_count(facts, 256),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 512),
        fused=layout.fused_experts,
    )
    shared = facts.size("shared_expert_intermediate_size", 512)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        count = Dim(heads[index], f"num_attention_heads_per_layer[{index}]")
        llama.attention(layer / "self_attn", replace(s, heads=count))
        layer.linear("self_attn.g_proj", count, s.hidden, kind=Kind.GATE)
        block = layer / "mlp"
        if not sparse[index]:
            llama.gated_mlp(block, s.hidden, s.intermediate)
        else:
            router = block.input("gate.weight", e.count, s.hidden)
            block.rule("gate.proj.weight", router, Kind.GATE)
            bias = block.input("experts.e_score_correction_bias", e.count)
            block.rule("gate.e_score_correction_bias", bias, Kind.STATE)
            moe.experts(block, e)
            llama.gated_mlp(block / "shared_expert", s.hidden, shared)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _ropes(facts: Facts) -> dict[str, dict[str, Any]]:
    """Position settings by kind of layer, as both runtimes read them."""
    given = facts.data.get("rope_parameters") or {windows.FULL: _FULL, windows.SLIDING: _SLIDING}
    nested = Facts({**facts.data, "rope_parameters": given}, path=facts.path, parent=facts)
    pair = windows.rope_by_kind(nested, full_theta=5e5, sliding_theta=1e4)
    spelled = {}
    for kind, settings in zip((windows.FULL, windows.SLIDING), pair, strict=True):
        default = _FULL if kind == windows.FULL else _SLIDING
        settings.setdefault("partial_rotary_factor", default["partial_rotary_factor"])
        moe.require_rope(facts, settings, ("default", "yarn"), unread=_UNREAD)
        spelled[kind] = spell.spell_rope(settings)["rope_parameters"]
    return spelled


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so for this type"
    llama.expect_silu(facts)
    if facts.data.get("gating", True) not in (True, "per-head"):
        facts.problem(
            f"config.json: {facts.path}gating must be per-head: the runtimes have no other"
        )
    facts.expect("moe_apply_router_weight_on_input", False, default=False, why=why)
    facts.expect("swa_attention_sink_enabled", False, default=False, why=why)
    facts.expect("norm_topk_prob", True, default=True, why=why)
    facts.expect("moe_router_score_func", "sigmoid", default="sigmoid", why=why)
    facts.expect("moe_router_use_sigmoid", True, default=True, why=why)
    out = spell.start(config)
    s, ropes = _sizes(facts), _ropes(facts)
    sparse = _sparse(facts, s.layers)
    moe.spell_expert_count(out, moe.expert_count(facts, 256))
    out.update(
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        num_attention_heads_per_layer=_heads(facts, s),
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=s.tied,
        attention_bias=s.attention_bias,
        qkv_bias=s.attention_bias,
        gating=True,
        layer_types=_kinds(facts, s.layers),
        sliding_window=int(facts.size("sliding_window", 512)),
        mlp_layer_types=["sparse" if one else "dense" for one in sparse],
        mlp_only_layers=[index for index, one in enumerate(sparse) if not one],
        decoder_sparse_step=1,
        rope_parameters=ropes,
        swa_rope_parameters=ropes[windows.SLIDING],
        rope_theta=ropes[windows.FULL]["rope_theta"],
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 512)),
        moe_routed_scaling_factor=facts.number("moe_routed_scaling_factor", 1.0),
        moe_router_logit_softcapping=facts.number("moe_router_logit_softcapping", 0.0),
        moe_apply_router_weight_on_input=False,
        moe_router_score_func="sigmoid",
        moe_router_use_sigmoid=True,
        norm_topk_prob=True,
        swa_attention_sink_enabled=False,
    )
    return out


_JOINED = {
    "mlp.experts.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    **{
        f"mlp.shared_expert.{name}.weight": f"mlp.shared_experts.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}
MAP = ArchMap(
    model_type="laguna",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}), Layout("fused experts", {}, _JOINED, True)),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
