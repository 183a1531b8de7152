"""The BERT encoder: absolute positions, post-norm layers, biases everywhere."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

LM: Final = "the runtime has no masked-language-model head; it embeds sentences"
_POOLER: Final = "the runtime pools token states itself and has no pooler layer"


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


def drop_pooler(at: Mount, facts: Facts) -> None:
    """Leave out the dense layer over the first token's state."""
    hidden = facts.size("hidden_size")
    at.drop("pooler.dense.weight", _POOLER, hidden, hidden)
    at.drop("pooler.dense.bias", _POOLER, hidden)


def labels(facts: Facts) -> int:
    """Classes that a classifier tells apart."""
    return len(facts.data.get("id2label") or ()) or int(facts.size("num_labels", 2))


def spelled_config(config: dict[str, Any], facts: Facts, *, pad: int) -> dict[str, Any]:
    """The config as the runtime reads it; ``pad`` is the reference's padding token."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    facts.expect(
        "position_embedding_type",
        "absolute",
        default="absolute",
        why="the runtime adds absolute positions",
    )
    facts.expect("is_decoder", False, default=False, why="the runtime attends both ways")
    out = spell.start(config)
    stated = facts.data.get("pad_token_id")
    out.update(
        type_vocab_size=int(facts.size("type_vocab_size", 2)),
        layer_norm_eps=facts.number("layer_norm_eps", 1e-12),
        max_position_embeddings=int(facts.size("max_position_embeddings", 512)),
        pad_token_id=pad if stated is None else stated,
    )
    if isinstance(facts.data.get("id2label"), dict):
        out["num_labels"] = labels(facts)
    return out
