"""The ModernBERT encoder: fused attention and gated MLP projections, norms before each half."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Mount


def encoder(at: Mount, facts: Facts) -> None:
    """Embeddings, layers and final norm, below ``at``; the first layer has one norm less."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    vocab, norms = facts.size("vocab_size"), facts.flag("norm_bias", False)
    attention, mlp = facts.flag("attention_bias", False), facts.flag("mlp_bias", False)
    at.embedding("embeddings.tok_embeddings", vocab, hidden)
    at.norm("embeddings.norm", hidden, bias=norms)
    for index, layer in at.layers("layers", facts.count("num_hidden_layers")):
        if index:
            layer.norm("attn_norm", hidden, bias=norms)
        layer.linear("attn.Wqkv", 3 * hidden, hidden, bias=attention)
        layer.linear("attn.Wo", hidden, hidden, bias=attention)
        layer.norm("mlp_norm", hidden, bias=norms)
        layer.linear("mlp.Wi", 2 * inner, hidden, bias=mlp)
        layer.linear("mlp.Wo", hidden, inner, bias=mlp)
    at.norm("final_norm", hidden, bias=norms)
