"""The Talkie text stack: weightless norms, learned gains, embeddings added after every layer."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, blocks, and a head that is a bare matrix with a gain."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    heads, inner = facts.size("num_attention_heads"), facts.size("intermediate_size")
    width = heads * facts.size("head_dim")
    model = root / "model"
    model.embedding("embed", vocab, hidden)
    for _, block in model.layers("blocks", facts.count("num_hidden_layers")):
        for name in ("attn_query", "attn_key", "attn_value"):
            block.linear(f"attn.{name}", width, hidden)
        block.linear("attn.attn_resid", hidden, width)
        block.tensor("attn.head_gain.head_g", heads, kind=Kind.NORM)
        block.linear("mlp.mlp_gate", inner, hidden)
        block.linear("mlp.mlp_linear", inner, hidden)
        block.linear("mlp.mlp_resid", hidden, inner)
        for name in ("attn_gain", "mlp_gain", "embed_skip"):
            block.tensor(f"{name}.a_g", 1, kind=Kind.NORM)
    root.tensor("lm_head", vocab, hidden, kind=Kind.HEAD)
    root.tensor("lm_head_gain.w_g", 1, kind=Kind.NORM)
