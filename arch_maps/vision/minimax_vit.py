"""The vision tower of MiniMax M3: a CLIP-like ViT with positions by rotation."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def tower(at: Mount, vision: Facts) -> None:
    """Patches of several frames, biased layers, and a norm before them."""
    hidden, wide = vision.size("hidden_size", 1280), vision.size("intermediate_size", 5120)
    patch = vision.size("patch_size", 14)
    frames, channels = vision.size("temporal_patch_size", 2), vision.size("num_channels", 3)
    kernel = (channels, frames, patch, patch)
    at.tensor("embeddings.patch_embedding.weight", hidden, *kernel, kind=Kind.CONV)
    at.norm("pre_layrnorm", hidden, bias=True)
    for _, layer in at.layers("encoder.layers", vision.count("num_hidden_layers", 32)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.linear(f"self_attn.{name}", hidden, hidden, bias=True)
        layer.linear("mlp.fc1", wide, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, wide, bias=True)
        layer.norm("layer_norm1", hidden, bias=True)
        layer.norm("layer_norm2", hidden, bias=True)
