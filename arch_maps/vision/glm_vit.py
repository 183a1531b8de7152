"""The GLM vision towers: 3-D patches, gated blocks, a strided convolution, a gated merger."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text.llama import gated_mlp


def tower(at: Mount, facts: Facts) -> None:
    """GLM-OCR and GLM 5.3: patches, blocks with normed heads, downsampling and merger.

    The merger is as wide as ``projection_intermediate_size``, or as GLM-OCR has it in code.
    """
    hidden, out = facts.size("hidden_size"), facts.size("out_hidden_size")
    channels, inner = facts.size("in_channels", 3), facts.size("intermediate_size")
    patch, frames = facts.size("patch_size", 14), facts.size("temporal_patch_size", 2)
    head = hidden // facts.size("num_heads")
    bias = facts.flag("attention_bias", True)
    at.conv("patch_embed.proj", hidden, channels, frames, patch, patch, bias=True)
    for _, block in at.layers("blocks", facts.count("depth")):
        block.norm("norm1", hidden)
        block.norm("norm2", hidden)
        block.linear("attn.qkv", 3 * hidden, hidden, bias=bias)
        block.linear("attn.proj", hidden, hidden, bias=bias)
        block.norm("attn.q_norm", head)
        block.norm("attn.k_norm", head)
        gated_mlp(block / "mlp", hidden, inner, bias=bias)
    at.norm("post_layernorm", hidden)
    side = facts.size("spatial_merge_size", 2)
    at.conv("downsample", out, hidden, side, side, bias=True)
    merger = at.at(source="merger", target="merger", part="projector")
    merger.linear("proj", out, out)
    merger.norm("post_projection_norm", out, bias=True)
    own = "projection_intermediate_size"
    gated_mlp(merger, out, facts.size(own) if own in facts.data else out * channels)


def spell_config(
    config: dict[str, Any], facts: Facts, *, model_type: str = "glm_ocr_vision"
) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    facts.expect("in_channels", 3, default=3, why="the runtime tells layouts apart by it")
    config.update(
        model_type=model_type,
        attention_bias=facts.flag("attention_bias", True),
        in_channels=3,
        num_heads=int(facts.size("num_heads")),
        patch_size=int(facts.size("patch_size", 14)),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        temporal_patch_size=int(facts.size("temporal_patch_size", 2)),
    )


GLM4V: Final = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "in_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 4096,
    "intermediate_size": 13696,
}
"""The reference's sizes of the tower of GLM-4.1V and what followed it."""


def glm4v_tower(at: Mount, given: Facts) -> None:
    """Patches, positions, blocks, downsampling and merger, below ``at``."""
    facts = given.filled(GLM4V)
    hidden, out = facts.size("hidden_size"), facts.size("out_hidden_size")
    patch, side = facts.size("patch_size"), facts.size("spatial_merge_size")
    frames, channels = facts.size("temporal_patch_size"), facts.size("in_channels")
    at.conv("patch_embed.proj", hidden, channels, frames, patch, patch, bias=True)
    across = facts.size("image_size") // patch
    at.embedding("embeddings.position_embedding", across * across, hidden, kind=Kind.POSITION)
    at.norm("post_conv_layernorm", hidden)
    for _, block in at.layers("blocks", facts.count("depth")):
        block.norm("norm1", hidden)
        block.norm("norm2", hidden)
        block.linear("attn.qkv", 3 * hidden, hidden)
        block.linear("attn.proj", hidden, hidden)
        gated_mlp(block / "mlp", hidden, out)
    at.norm("post_layernorm", hidden)
    at.conv("downsample", out, hidden, side, side, bias=True)
    merger = at.at(source="merger", target="merger", part="projector")
    merger.linear("proj", out, out)
    merger.norm("post_projection_norm", out, bias=True)
    gated_mlp(merger, out, facts.size("intermediate_size"))


def spell_glm4v(config: dict[str, Any], given: Facts, *, model_type: str) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts = given.filled(GLM4V)
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    facts.expect("in_channels", 3, default=3, why="the runtime tells layouts apart by it")
    facts.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    rope = spell.rope(facts)
    if rope["rope_theta"] != 10000.0:
        facts.problem(f"config.json: {facts.path}rope_theta must be 10000; the runtime takes it")
    for name in GLM4V:
        config[name] = facts.data[name]
    config.update(model_type=model_type, hidden_act="silu", attention_bias=False)
