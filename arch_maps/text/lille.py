"""The Lille text stack: each half of a layer holds the norm before it."""

from __future__ import annotations

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers and final norm; the head is the table."""
    hidden, vocab = facts.size("n_embd"), facts.size("vocab_size")
    heads, groups = facts.size("n_head"), facts.size("n_kv_heads")
    head_dim = hidden // int(heads)
    inner = Dim(256 * round(int(8 * int(hidden) / 3) / 256), "n_embd*8/3")
    at = root / "transformer"
    at.embedding("tok_embeddings", vocab, hidden)
    for _, layer in at.layers("layers", facts.count("n_layer")):
        layer.linear("attention.qkv_proj", (heads + 2 * groups) * head_dim, hidden)
        layer.linear("attention.out_proj", hidden, heads * head_dim)
        layer.norm("attention.norm", hidden)
        layer.linear("feed_forward.gate_proj", inner, hidden)
        layer.linear("feed_forward.up_proj", inner, hidden)
        layer.linear("feed_forward.down_proj", hidden, inner)
        layer.norm("feed_forward.norm", hidden)
    at.norm("norm", hidden)
    root.head("lm_head", vocab, hidden, tied_to="transformer.tok_embeddings.weight")
