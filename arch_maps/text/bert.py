"""The BERT encoder: absolute positions, post-norm layers, biases everywhere."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def encoder(at: Mount, facts: Facts) -> None:
    """Embeddings and layers, below ``at``."""
    hidden = facts.size("hidden_size")
    inner = facts.size("intermediate_size")
    embeddings = at / "embeddings"
    embeddings.embedding("word_embeddings", facts.size("vocab_size"), hidden)
    positions, segments = facts.size("max_position_embeddings"), facts.size("type_vocab_size", 2)
    embeddings.embedding("position_embeddings", positions, hidden, kind=Kind.POSITION)
    embeddings.embedding("token_type_embeddings", segments, hidden, kind=Kind.POSITION)
    embeddings.norm("LayerNorm", hidden, bias=True)
    embeddings.drop("position_ids", "position indices are 0, 1, 2, ...")
    embeddings.drop("token_type_ids", "segment indices default to 0")
    for _, layer in at.layers("encoder.layer", facts.count("num_hidden_layers")):
        for name in ("query", "key", "value"):
            layer.linear(f"attention.self.{name}", hidden, hidden, bias=True)
        layer.linear("attention.output.dense", hidden, hidden, bias=True)
        layer.norm("attention.output.LayerNorm", hidden, bias=True)
        layer.linear("intermediate.dense", inner, hidden, bias=True)
        layer.linear("output.dense", hidden, inner, bias=True)
        layer.norm("output.LayerNorm", hidden, bias=True)
