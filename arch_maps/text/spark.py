"""The Spark text stack: fused heads with an output gate for each, and a GELU-gated MLP."""

from __future__ import annotations

from arch_maps.rules import Kind, Mount
from arch_maps.text import llama


def causal_lm(root: Mount, s: llama.Sizes) -> None:
    """Table, layers, final norm and head."""
    model = root / "model"
    model.embedding("embedding", s.vocab, s.hidden)
    for _, layer in model.layers("layers", s.layers):
        at = layer / "self_attn"
        fused = (s.heads + 2 * s.kv_heads) * s.head_dim
        at.linear("q_k_v_proj", fused, s.hidden, bias=s.attention_bias)
        at.linear("g_proj", s.heads, s.hidden, bias=s.attention_bias, kind=Kind.GATE)
        at.linear("out_proj", s.hidden, s.heads * s.head_dim, bias=s.attention_bias)
        at.drop("rotary_emb.inv_freq", "position frequencies follow from the config")
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate, bias=s.mlp_bias)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embedding.weight" if s.tied else None)
