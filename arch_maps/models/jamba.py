"""Jamba: Mamba layers with some attention, and experts in every other layer."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe


def _every(facts: Facts, name: str, period: int, offset: int, layers: int) -> list[bool]:
    """The layers at ``offset`` of each ``period``, as the config's two numbers say."""
    period = int(facts.size(f"{name}_layer_period", period))
    stated = facts.data.get(f"{name}_layer_offset", offset)
    return [index % period == stated for index in range(layers)]


def _mamba(at: Mount, facts: Facts, hidden: int) -> None:
    """The Mamba mixer with norms on the step size and on both state projections."""
    inner = facts.size("mamba_expand", 2) * hidden
    state = facts.size("mamba_d_state", 16)
    bias = facts.flag("mamba_proj_bias", False)
    rank = -(-int(hidden) // 16)
    if facts.data.get("mamba_dt_rank", "auto") != "auto":
        rank = facts.size("mamba_dt_rank")
    at.linear("in_proj", 2 * inner, hidden, bias=bias)
    conv_bias = facts.flag("mamba_conv_bias", True)
    at.conv("conv1d", inner, 1, facts.size("mamba_d_conv", 4), bias=conv_bias)
    at.linear("x_proj", rank + 2 * state, inner)
    at.linear("dt_proj", inner, rank, bias=True)
    at.tensor("A_log", inner, state, kind=Kind.STATE)
    at.tensor("D", inner, kind=Kind.STATE)
    at.norm("dt_layernorm", rank)
    at.norm("b_layernorm", state)
    at.norm("c_layernorm", state)
    at.linear("out_proj", hidden, inner, bias=bias)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = llama.sizes(facts, kv_heads=8)
    attending = _every(facts, "attn", 8, 4, s.layers)
    e = moe.Experts(
        count=moe.expert_count(facts, 16),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
    )
    sparse = _every(facts, "expert", 2, 1, s.layers)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        if attending[index]:
            llama.attention(layer / "self_attn", s)
        else:
            _mamba(layer / "mamba", facts, s.hidden)
        block = layer / "feed_forward"
        if sparse[index] and e.count > 1:
            block.linear("router", e.count, s.hidden, kind=Kind.GATE)
            moe.experts(block, e)
        else:
            llama.gated_mlp(block, s.hidden, s.intermediate)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("pre_ff_layernorm", s.hidden)
    model.norm("final_layernorm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    out = spell.start(config)
    s = llama.sizes(facts, kv_heads=8)
    period = int(facts.size("expert_layer_period", 2))
    offset = facts.data.get("expert_layer_offset", 1)
    rank = facts.data.get("mamba_dt_rank", "auto")
    for derived in ("layers_block_type", "layer_types", "layers_num_experts"):
        out.pop(derived, None)
    moe.spell_expert_count(out, moe.expert_count(facts, 16))
    out.update(
        num_key_value_heads=int(s.kv_heads),
        attn_layer_period=int(facts.size("attn_layer_period", 8)),
        attn_layer_offset=facts.data.get("attn_layer_offset", 4),
        expert_layer_period=period,
        # The runtimes count from the other side: a layer has experts where (i + offset) divides.
        expert_layer_offset=-offset % period,
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 2)),
        mamba_d_conv=int(facts.size("mamba_d_conv", 4)),
        mamba_d_state=int(facts.size("mamba_d_state", 16)),
        mamba_expand=int(facts.size("mamba_expand", 2)),
        mamba_dt_rank=-(-int(s.hidden) // 16) if rank == "auto" else int(rank),
        mamba_proj_bias=facts.flag("mamba_proj_bias", False),
        mamba_conv_bias=facts.flag("mamba_conv_bias", True),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 262144)),
        tie_word_embeddings=s.tied,
    )
    return out


MAP = ArchMap(
    model_type="jamba",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
