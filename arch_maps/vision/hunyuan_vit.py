"""The HunyuanOCR tower: patches of any grid, a resampled table, and a merger with line ends."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def tower(at: Mount, facts: Facts) -> None:
    """Embeddings and pre-norm layers, below ``at``."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    patch, channels = facts.size("patch_size"), facts.size("num_channels", 3)
    at.conv("embeddings.patch_embedding", hidden, channels, patch, patch, bias=True)
    side = facts.size("max_image_size", 2048) // patch
    name = "embeddings.position_embedding"
    at.embedding(name, side * side + 1, hidden, kind=Kind.POSITION)
    for _, layer in at.layers("layers", facts.count("num_hidden_layers")):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.linear(f"self_attn.{name}", hidden, hidden, bias=True)
        layer.linear("mlp.dense_h_to_4h", inner, hidden, bias=True)
        layer.linear("mlp.dense_4h_to_h", hidden, inner, bias=True)
        layer.norm("input_layernorm", hidden, bias=True)
        layer.norm("post_attention_layernorm", hidden, bias=True)


def merger(at: Mount, facts: Facts, out: int) -> None:
    """Neighbouring patches joined by convolutions, between marks of begin, end and line end."""
    hidden = facts.size("hidden_size")
    merge = facts.size("spatial_merge_size", 2)
    at.norm("before_rms", hidden)
    at.conv("proj.0", 2 * hidden, hidden, merge, merge, bias=True)
    at.conv("proj.2", 4 * hidden, 2 * hidden, 1, 1, bias=True)
    at.linear("mlp", out, 4 * hidden, bias=True)
    at.norm("after_rms", out)
    at.tensor("image_newline", 4 * hidden, kind=Kind.POSITION)
    for name in ("image_begin", "image_end", "image_sep"):
        at.tensor(name, out, kind=Kind.POSITION)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("add_patchemb_bias", True, default=True, why="the runtime has this bias")
    config.update(
        model_type="hunyuan_vl",
        num_channels=int(facts.size("num_channels", 3)),
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        max_image_size=int(facts.size("max_image_size", 2048)),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
    )
