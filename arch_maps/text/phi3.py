"""The Phi-3 text stack: Llama's, with one projection for q, k and v, and one for gate and up."""

from __future__ import annotations

from collections.abc import Callable

from arch_maps.rules import Mount
from arch_maps.text.llama import Sizes

Dense = Callable[[Mount, str, int, int], None]
"""Adds one projection of a layer: its place, its name, its outputs and its inputs."""


def stack(at: Mount, s: Sizes, *, dense: Dense = Mount.linear) -> None:
    """Embedding, decoder layers and final norm, below ``at``; ``dense`` adds projections."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for _, layer in at.layers("layers", s.layers):
        heads = s.heads + 2 * s.kv_heads
        dense(layer, "self_attn.qkv_proj", heads * s.head_dim, s.hidden)
        dense(layer, "self_attn.o_proj", s.hidden, s.heads * s.head_dim)
        dense(layer, "mlp.gate_up_proj", 2 * s.intermediate, s.hidden)
        dense(layer, "mlp.down_proj", s.hidden, s.intermediate)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    at.norm("norm", s.hidden)
