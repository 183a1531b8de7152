"""The Qwen3-Next text stack: Qwen3.5's with its projections interleaved by key head."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama, moe, qwen3_5

_MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"


def gated_delta_net(at: Mount, s: qwen3_5.Sizes) -> None:
    """Linear attention with q, k, v and z in one projection, b and a in another."""
    keys, values = s.key_heads * s.key_dim, s.value_heads * s.value_dim
    at.linear("in_proj_qkvz", 2 * keys + 2 * values, s.hidden)
    at.linear("in_proj_ba", 2 * s.value_heads, s.hidden, kind=Kind.GATE)
    at.conv("conv1d", 2 * keys + values, 1, s.kernel)
    at.tensor("dt_bias", s.value_heads, kind=Kind.STATE)
    at.tensor("A_log", s.value_heads, kind=Kind.STATE)
    at.norm("norm", s.value_dim)
    at.linear("out_proj", s.hidden, values)


def routed(facts: Facts, *, fused: bool) -> moe.Experts:
    """The routed experts of a config."""
    return moe.Experts(
        count=moe.expert_count(facts, 512),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size("moe_intermediate_size", 512),
        fused=fused,
    )


def stack(at: Mount, facts: Facts, s: qwen3_5.Sizes, *, fused: bool) -> None:
    """Embedding, decoder layers and final norm, below ``at``."""
    e = routed(facts, fused=fused)
    shared = facts.size("shared_expert_intermediate_size", 512)
    sparse = moe.sparse_layers(facts, len(s.layer_types))
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", len(s.layer_types)):
        if s.layer_types[index] == "full_attention":
            qwen3_5.gated_attention(layer / "self_attn", s)
        else:
            gated_delta_net(layer / "linear_attn", s)
        if sparse[index]:
            moe.gated_shared(layer / "mlp", e, shared)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        layer.norm("input_layernorm", s.hidden, offset=qwen3_5.NORM_OFFSET)
        layer.norm("post_attention_layernorm", s.hidden, offset=qwen3_5.NORM_OFFSET)
    at.norm("norm", s.hidden, offset=qwen3_5.NORM_OFFSET)


def drop_mtp(root: Mount, facts: Facts, s: qwen3_5.Sizes) -> None:
    """Leave out the drafter's one layer, which the config does not announce."""
    e = routed(facts, fused=False)
    shared = facts.size("shared_expert_intermediate_size", 512)

    def block(at: Mount) -> None:
        at.linear("fc", s.hidden, 2 * s.hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            at.norm(name, s.hidden)
        layer = at / "layers.0"
        qwen3_5.gated_attention(layer / "self_attn", s)
        moe.gated_shared(layer / "mlp", e, shared)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)

    moe.drop_block(root, "mtp", block, _MTP)
