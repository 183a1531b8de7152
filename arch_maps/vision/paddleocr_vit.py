"""PaddleOCR-VL's tower: SigLIP with rotary positions, and a projector of four patches."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.ops import Concat
from arch_maps.rules import Kind, Mount

_DEFAULTS: Final = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
"""The reference's."""
TEXT_WIDTH: Final = 1024
"""The text stack's width, which the runtime's projector has in its code."""
_UNUSED: Final = "neither the reference nor the runtime reads it"
_PACKED: Final = 32768


def tower(at: Mount, given: Facts) -> None:
    """Embeddings, layers and the last norm, below ``at``."""
    facts = given.filled(_DEFAULTS)
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch = facts.size("patch_size")
    embeddings = at / "embeddings"
    embeddings.conv("patch_embedding", hidden, facts.size("num_channels"), patch, patch, bias=True)
    places = (facts.size("image_size") // patch) ** 2
    embeddings.embedding("position_embedding", places, hidden, kind=Kind.POSITION)
    embeddings.drop("packing_position_embedding.weight", _UNUSED, _PACKED, hidden)
    embeddings.drop("position_ids", "position indices follow from the image size")
    encoder = at.at(source="encoder", target="")
    for _, layer in encoder.layers("layers", facts.count("num_hidden_layers")):
        attention = layer / "self_attn"
        names = [f"{name}_proj" for name in "qkv"]
        rows = tuple(attention.input(f"{name}.weight", hidden, hidden) for name in names)
        attention.rule("qkv.weight", Concat(rows), Kind.LINEAR)
        biases = tuple(attention.input(f"{name}.bias", hidden) for name in names)
        attention.rule("qkv.bias", Concat(biases), Kind.BIAS)
        attention.linear("out_proj", hidden, hidden, bias=True)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
        for name in ("layer_norm1", "layer_norm2"):
            layer.norm(name, hidden, bias=True)
    at.norm("post_layernorm", hidden, bias=True)
    _drop_head(at / "head", hidden, inner)


def _drop_head(at: Mount, hidden: int, inner: int) -> None:
    at.drop("probe", _UNUSED, 1, 1, hidden)
    at.drop("attention.in_proj_weight", _UNUSED, 3 * hidden, hidden)
    at.drop("attention.in_proj_bias", _UNUSED, 3 * hidden)
    for name, out, inp in (
        ("attention.out_proj", hidden, hidden),
        ("mlp.fc1", inner, hidden),
        ("mlp.fc2", hidden, inner),
    ):
        at.drop(f"{name}.weight", _UNUSED, out, inp)
        at.drop(f"{name}.bias", _UNUSED, out)
    for name in ("weight", "bias"):
        at.drop(f"layernorm.{name}", _UNUSED, hidden)


def projector(at: Mount, given: Facts) -> None:
    """A norm and two dense layers over four patches, below ``at``."""
    facts = given.filled(_DEFAULTS)
    hidden = facts.size("hidden_size")
    wide = facts.size("spatial_merge_size") ** 2 * hidden
    at.norm("pre_norm", hidden, bias=True)
    at.linear("linear_1", wide, wide, bias=True)
    at.linear("linear_2", TEXT_WIDTH, wide, bias=True)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write every setting of the tower, in place."""
    given.expect(
        "hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh", why="the runtime's choice"
    )
    given.expect("layer_norm_eps", 1e-6, default=1e-6, why="the runtime's layers have it in code")
    for name, value in _DEFAULTS.items():
        config[name] = int(given.size(name, value))
    config.update(model_type="paddleocr_vl", layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh")
