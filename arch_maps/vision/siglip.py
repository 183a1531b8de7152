"""The SigLIP vision tower: 2-D patches, a square table of positions, separate q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        encoder_layer(layer, hidden, inner)
    at.norm("post_layernorm", hidden, bias=True)


def encoder_layer(at: Mount, hidden: int, inner: int) -> None:
    """Pre-norm attention and MLP with biases, as CLIP has them too."""
    attention(at / "self_attn", hidden)
    at.norm("layer_norm1", hidden, bias=True)
    at.norm("layer_norm2", hidden, bias=True)
    at.linear("mlp.fc1", inner, hidden, bias=True)
    at.linear("mlp.fc2", hidden, inner, bias=True)


def attention(at: Mount, hidden: int) -> None:
    """Multi-head self-attention with biases."""
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        at.linear(name, hidden, hidden, bias=True)


DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
"""The reference's sizes, for releases that leave them out."""


def spell_config(
    config: dict[str, Any],
    facts: Facts,
    *,
    model_type: str = "siglip_vision_model",
    defaults: Mapping[str, Any] = DEFAULTS,
) -> None:
    """Write the tower's facts as the runtimes read them, in place."""
    facts.expect(
        "hidden_act",
        "gelu_pytorch_tanh",
        default="gelu_pytorch_tanh",
        why="the runtimes compute tanh GELU whatever it says",
    )
    for name, value in defaults.items():
        if config.get(name) is None:
            config[name] = value
    config["model_type"] = model_type
