"""The SigLIP vision tower: 2-D patches, a square table of positions, separate q, k and v."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def tower(at: Mount, facts: Facts) -> None:
    """Embeddings, encoder and final norm, below ``at``."""
    hidden = facts.size("hidden_size")
    side, patch = facts.size("image_size"), facts.size("patch_size")
    embeddings = at / "embeddings"
    channels = facts.size("num_channels", 3)
    embeddings.conv("patch_embedding", hidden, channels, patch, patch, bias=True)
    per_side = side // patch
    embeddings.embedding("position_embedding", per_side * per_side, hidden, kind=Kind.POSITION)
    embeddings.drop("position_ids", "position indices follow from the image size")
    inner = facts.size("intermediate_size")
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        attention(layer / "self_attn", hidden)
        layer.norm("layer_norm1", hidden, bias=True)
        layer.norm("layer_norm2", hidden, bias=True)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
    at.norm("post_layernorm", hidden, bias=True)


def attention(at: Mount, hidden: int) -> None:
    """Multi-head self-attention with biases."""
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        at.linear(name, hidden, hidden, bias=True)
