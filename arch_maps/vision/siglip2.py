"""The SigLIP 2 tower for pictures of any shape: patches come flat, positions are resampled."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.vision import siglip

DEFAULTS: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
    "num_patches": 256,
    "layer_norm_eps": 1e-6,
}
"""The reference's sizes."""


def tower(at: Mount, given: Facts) -> None:
    """Embeddings, encoder and final norm, below ``at``."""
    facts = given.filled(DEFAULTS)
    hidden, inner, patch = (
        facts.size(name) for name in ("hidden_size", "intermediate_size", "patch_size")
    )
    embeddings = at / "embeddings"
    pixels = facts.size("num_channels") * patch * patch
    embeddings.linear("patch_embedding", hidden, pixels, bias=True)
    count = facts.size("num_patches")
    embeddings.embedding("position_embedding", count, hidden, kind=Kind.POSITION)
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        siglip.encoder_layer(layer, hidden, inner)
    at.norm("post_layernorm", hidden, bias=True)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    given.expect("vision_use_head", False, default=True, why="the runtime has no pooling head")
    siglip.spell_config(config, given, model_type="siglip2_vision_model", defaults=DEFAULTS)
    config["vision_use_head"] = False
