"""LFM2 mixtures of experts: short convolutions, some attention, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_LEAVES = ("w1", "w3", "w2")


def _kinds(facts: Facts) -> list[str]:
    layers = facts.count("num_hidden_layers")
    kinds = facts.data.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers or "full_attention" not in kinds:
        facts.problem(f"config.json: {facts.path}layer_types must list {layers} layers' kinds")
        return ["full_attention"] * layers
    return kinds


def _attention(at: Mount, s: llama.Sizes) -> None:
    for name, heads in (("q_proj", s.heads), ("k_proj", s.kv_heads), ("v_proj", s.kv_heads)):
        at.linear(name, heads * s.head_dim, s.hidden)
    at.linear("out_proj", s.hidden, s.heads * s.head_dim)
    at.norm("q_layernorm", s.head_dim)
    at.norm("k_layernorm", s.head_dim)


def _convolution(at: Mount, facts: Facts, s: llama.Sizes) -> None:
    bias = facts.flag("conv_bias", False)
    at.conv("conv", s.hidden, 1, facts.size("conv_L_cache", 3), bias=bias)
    at.linear("in_proj", 3 * s.hidden, s.hidden, bias=bias)
    at.linear("out_proj", s.hidden, s.hidden, bias=bias)


def _dense(at: Mount, s: llama.Sizes) -> None:
    for leaf, name in zip(_LEAVES, ("gate_proj", "up_proj", "down_proj"), strict=True):
        shape = (s.hidden, s.intermediate) if leaf == "w2" else (s.intermediate, s.hidden)
        at.rule(f"{name}.weight", at.input(f"{leaf}.weight", *shape), Kind.LINEAR)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = llama.sizes(facts, kv_heads=8)
    kinds = _kinds(facts)
    sparse = moe.dense_prefix(facts, s.layers, name="num_dense_layers")
    routed = moe.Experts(
        count=moe.expert_count(facts, 32),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 1792),
        fused=layout.fused_experts,
        names=_LEAVES,
    )
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        if kinds[index] == "full_attention":
            _attention(layer / "self_attn", s)
        else:
            _convolution(layer / "conv", facts, s)
        block = layer / "feed_forward"
        if sparse[index]:
            block.linear("gate", routed.count, s.hidden, kind=Kind.GATE)
            if facts.flag("use_expert_bias", True):
                block.tensor("expert_bias", routed.count, kind=Kind.STATE)
            moe.experts(block, routed)
        else:
            _dense(block, s)
        layer.norm("operator_norm", s.hidden)
        layer.norm("ffn_norm", s.hidden)
    model.norm("embedding_norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes reuse the input embedding as the head"
    facts.expect("tie_word_embeddings", True, default=True, why=why)
    facts.expect("tie_embedding", True, default=True, why=why)
    out = spell.start(config)
    s = llama.sizes(facts, kv_heads=8)
    kinds = _kinds(facts)
    moe.spell_config(out, facts, s, max_positions=128000, theta=1e6)
    eps = facts.number("norm_eps", 1e-5)
    moe.spell_expert_count(out, moe.expert_count(facts, 32))
    out.update(
        norm_eps=eps,
        rms_norm_eps=eps,
        tie_word_embeddings=True,
        tie_embedding=True,
        layer_types=kinds,
        full_attn_idxs=[i for i, kind in enumerate(kinds) if kind == "full_attention"],
        conv_bias=facts.flag("conv_bias", False),
        conv_L_cache=int(facts.size("conv_L_cache", 3)),
        num_dense_layers=facts.data.get("num_dense_layers", 2),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 1792)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 4)),
        use_expert_bias=facts.flag("use_expert_bias", True),
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        routed_scaling_factor=facts.number("routed_scaling_factor", 1.0),
    )
    return out


MAP = ArchMap(
    model_type="lfm2_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
