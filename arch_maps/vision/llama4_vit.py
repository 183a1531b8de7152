"""The Llama 4 vision tower: unfolded patches, rotary positions, a class token behind them."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "hidden_size": 768,
    "intermediate_size": 5632,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "projector_dropout": 0.0,
    "initializer_range": 0.02,
}
"""The reference's facts."""


def tower(at: Mount, given: Facts) -> None:
    """Patches, positions, layers, norms and the adapter, below ``at``."""
    facts = given.filled(DEFAULTS)
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch = facts.size("patch_size")
    across = facts.size("image_size") // patch
    at.linear("patch_embedding.linear", hidden, facts.size("num_channels") * patch * patch)
    at.tensor("class_embedding", hidden, kind=Kind.POSITION)
    at.tensor("positional_embedding_vlm", across * across + 1, hidden, kind=Kind.POSITION)
    at.norm("layernorm_pre", hidden, bias=True)
    at.norm("layernorm_post", hidden, bias=True)
    for _, layer in at.layers("model.layers", facts.count("num_hidden_layers")):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.linear(f"self_attn.{name}", hidden, hidden, bias=True)
        layer.linear("mlp.fc1", inner, hidden, bias=True)
        layer.linear("mlp.fc2", hidden, inner, bias=True)
        layer.norm("input_layernorm", hidden, bias=True)
        layer.norm("post_attention_layernorm", hidden, bias=True)
    out = facts.size("projector_output_dim")
    at.linear("vision_adapter.mlp.fc1", facts.size("projector_input_dim"), inner)
    at.linear("vision_adapter.mlp.fc2", out, out)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts = given.filled(DEFAULTS)
    facts.expect("hidden_act", "gelu", default="gelu", why="the release means exact GELU")
    facts.expect("vision_feature_layer", -1, default=-1, why="the runtime takes the last layer")
    rope = spell.rope(facts)
    for name in DEFAULTS:
        config[name] = facts.data[name]
    config.update(
        model_type="llama4_vision_model",
        rope_theta=rope["rope_theta"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
