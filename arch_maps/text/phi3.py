"""The Phi-3 text stack: Llama's, with one projection for q, k and v, and one for gate and up."""

from __future__ import annotations

from arch_maps.rules import Mount
from arch_maps.text.llama import Sizes


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, decoder layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for _, layer in at.layers("layers", s.layers):
        heads = s.heads + 2 * s.kv_heads
        layer.linear("self_attn.qkv_proj", heads * s.head_dim, s.hidden)
        layer.linear("self_attn.o_proj", s.hidden, s.heads * s.head_dim)
        layer.linear("mlp.gate_up_proj", 2 * s.intermediate, s.hidden)
        layer.linear("mlp.down_proj", s.hidden, s.intermediate)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    at.norm("norm", s.hidden)
