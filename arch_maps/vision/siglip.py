"""The SigLIP vision tower: 2-D patches, a square table of positions, separate q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arch_maps.facts import Facts
from arch_maps.ops import Permute, Reshape
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


def dense_patch_tower(at: Mount, facts: Facts, positions: int, *, conv: bool = False) -> None:
    """As ``tower``, SigLIP 2's: patches of any grid through a dense layer, ``positions`` in all.

    ``conv``: the release has it as a convolution, [out, channels, rows, columns].
    """
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch = facts.size("patch_size")
    embeddings = at / "embeddings"
    channels = facts.size("num_channels", 3)
    pixels = patch * patch * channels
    if conv:
        weight = embeddings.input("patch_embedding.weight", hidden, channels, patch, patch)
        dense = Reshape(Permute(weight, (0, 2, 3, 1)), (hidden, pixels))
        embeddings.rule("patch_embedding.weight", dense, Kind.LINEAR)
        embeddings.tensor("patch_embedding.bias", hidden, kind=Kind.BIAS)
        embeddings.drop("position_ids", "position indices follow from the image size")
    else:
        embeddings.linear("patch_embedding", hidden, pixels, bias=True)
    embeddings.embedding("position_embedding", positions, hidden, kind=Kind.POSITION)
    for _, layer in at.layers("encoder.layers", facts.count("num_hidden_layers")):
        encoder_layer(layer, hidden, inner)
    at.norm("post_layernorm", hidden, bias=True)


def drop_pooling_head(at: Mount, facts: Facts, *, required: bool = False) -> None:
    """Leave out the attention pool, which no picture token passes through."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    reason = "the attention pool makes one vector of a picture; the text reads its patches"
    shapes: dict[str, tuple[int, ...]] = {
        "probe": (1, 1, hidden),
        "attention.in_proj_weight": (3 * hidden, hidden),
        "attention.in_proj_bias": (3 * hidden,),
        "attention.out_proj.weight": (hidden, hidden),
        "attention.out_proj.bias": (hidden,),
        "layernorm.weight": (hidden,),
        "layernorm.bias": (hidden,),
        "mlp.fc1.weight": (inner, hidden),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (hidden, inner),
        "mlp.fc2.bias": (hidden,),
    }
    for name, shape in shapes.items():
        at.drop(name, reason, *shape, required=required)


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


def pooling_head(at: Mount, facts: Facts) -> None:
    """The attention pool after the tower, whose three projections are one tensor, below ``at``."""
    hidden = facts.size("hidden_size")
    at.tensor("probe", 1, 1, hidden, kind=Kind.POSITION)
    joined = at / "attention"
    for leaf, shape, kind in (
        ("weight", (3 * hidden, hidden), Kind.LINEAR),
        ("bias", (3 * hidden,), Kind.BIAS),
    ):
        joined.rule(f"in_proj.{leaf}", joined.input(f"in_proj_{leaf}", *shape), kind)
    joined.linear("out_proj", hidden, hidden, bias=True)
    at.norm("layernorm", hidden, bias=True)
    inner = facts.size("intermediate_size")
    at.linear("mlp.fc1", inner, hidden, bias=True)
    at.linear("mlp.fc2", hidden, inner, bias=True)


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
