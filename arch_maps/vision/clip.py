"""The CLIP vision tower: a class token before the patches, norms on both ends."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.vision import siglip

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}


def tower(at: Mount, given: Facts) -> None:
    """Embeddings, encoder and both norms, below ``at``."""
    facts = given.filled(_DEFAULTS)
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch = facts.size("patch_size")
    embeddings = at / "embeddings"
    embeddings.tensor("class_embedding", hidden, kind=Kind.POSITION)
    embeddings.conv("patch_embedding", hidden, facts.size("num_channels"), patch, patch)
    side = facts.size("image_size") // patch
    embeddings.embedding("position_embedding", side * side + 1, hidden, kind=Kind.POSITION)
    embeddings.drop("position_ids", "position indices follow from the image size")
    at.norm("pre_layrnorm", hidden, bias=True)
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        siglip.encoder_layer(layer, hidden, inner)
    at.norm("post_layernorm", hidden, bias=True)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtimes read them, in place."""
    facts.expect(
        "hidden_act", "quick_gelu", default="quick_gelu", why="the runtime computes x*sigmoid(1.7x)"
    )
    facts.expect(
        "layer_norm_eps", 1e-5, default=1e-5, why="the runtime's outer norms have it in their code"
    )
    for name, value in _DEFAULTS.items():
        config.setdefault(name, value)
    config.update(model_type="clip_vision_model", layer_norm_eps=1e-5)
