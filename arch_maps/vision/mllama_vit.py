"""The Llama 3.2 Vision tower: tiles with tables of their places, gated layers after plain ones."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

_RATIOS: Final = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
DEFAULTS: Final = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": _RATIOS,
}
"""The reference's facts."""


def tower(at: Mount, given: Facts) -> None:
    """Patches, tables, both encoders and their norms, below ``at``."""
    facts = given.filled(DEFAULTS)
    hidden, patch = facts.size("hidden_size"), facts.size("patch_size")
    tiles = facts.size("max_num_tiles")
    # Row 0 stands for no picture.
    shapes = Dim(len(facts.data["supported_aspect_ratios"]) + 1, "supported_aspect_ratios+1")
    across = facts.size("image_size") // patch
    patches = across * across + 1
    at.conv("patch_embedding", hidden, facts.size("num_channels"), patch, patch)
    at.tensor("class_embedding", hidden, kind=Kind.POSITION)
    places = at / "gated_positional_embedding"
    places.tensor("embedding", patches, hidden, kind=Kind.POSITION)
    places.tensor("gate", 1, kind=Kind.GATE)
    size = tiles * patches * hidden
    places.embedding("tile_embedding", shapes, size, kind=Kind.POSITION)
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        table = at / name
        table.embedding("embedding", shapes, tiles * hidden, kind=Kind.POSITION)
        table.tensor("gate", 1, kind=Kind.GATE)
    at.norm("layernorm_pre", hidden, bias=True)
    at.norm("layernorm_post", hidden, bias=True)
    inner = facts.size("intermediate_size")
    for _, layer in at.layers("transformer.layers", facts.count("num_hidden_layers")):
        _layer(layer, hidden, inner)
    for _, layer in at.layers("global_transformer.layers", facts.count("num_global_layers")):
        _layer(layer, hidden, inner)
        layer.tensor("gate_attn", 1, kind=Kind.GATE)
        layer.tensor("gate_ffn", 1, kind=Kind.GATE)


def _layer(at: Mount, hidden: int, inner: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        at.linear(f"self_attn.{name}", hidden, hidden)
    at.linear("mlp.fc1", inner, hidden, bias=True)
    at.linear("mlp.fc2", hidden, inner, bias=True)
    at.norm("input_layernorm", hidden, bias=True)
    at.norm("post_attention_layernorm", hidden, bias=True)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts = given.filled(DEFAULTS)
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes exact GELU")
    facts.expect(
        "norm_eps", 1e-5, default=1e-5, why="the reference's outer norms have it in their code"
    )
    for name in DEFAULTS:
        config[name] = facts.data[name]
    config.update(
        model_type="mllama_vision_model",
        hidden_act="gelu",
        # The runtime reads this name alone.
        num_attention_heads=int(facts.size("attention_heads")),
    )
    if len(facts.data["supported_aspect_ratios"]) != len(_RATIOS):
        facts.problem(
            f"config.json: {facts.path}supported_aspect_ratios must be {len(_RATIOS)} shapes: the "
            "runtime reads their number from a key that the reference does not let a config have"
        )
