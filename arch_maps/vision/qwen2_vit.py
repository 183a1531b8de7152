"""The vision towers of Qwen2-VL and Qwen2.5-VL: 3-D patches, rotary positions, one merger."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount
from arch_maps.text.llama import gated_mlp

_CHANNELS = "the runtime takes a patch kernel without three channels for one of another layout"


def qwen2_tower(at: Mount, facts: Facts) -> None:
    """Qwen2-VL: LayerNorm with bias and a plain MLP, below ``at``."""
    hidden = facts.size("embed_dim", 1280)
    inner = _inner(facts, hidden)
    _patches(at, facts, hidden)
    for _, block in at.layers("blocks", facts.count("depth", 32)):
        block.norm("norm1", hidden, bias=True)
        block.norm("norm2", hidden, bias=True)
        _attention(block, hidden)
        block.linear("mlp.fc1", inner, hidden, bias=True)
        block.linear("mlp.fc2", hidden, inner, bias=True)
    _merger(at, facts, hidden, facts.size("hidden_size", 3584), norm_bias=True)


def qwen2_5_tower(at: Mount, facts: Facts) -> None:
    """Qwen2.5-VL: RMS norms and a gated MLP with biases, below ``at``."""
    hidden = facts.size("hidden_size", 3584)
    _patches(at, facts, hidden)
    for _, block in at.layers("blocks", facts.count("depth", 32)):
        block.norm("norm1", hidden)
        block.norm("norm2", hidden)
        _attention(block, hidden)
        gated_mlp(block / "mlp", hidden, facts.size("intermediate_size", 3420), bias=True)
    _merger(at, facts, hidden, facts.size("out_hidden_size", 3584), norm_bias=False)


def spell_qwen2(config: dict[str, Any], facts: Facts) -> None:
    """Write the Qwen2-VL tower's facts as the runtime reads them, in place."""
    facts.expect(
        "hidden_act", "quick_gelu", default="quick_gelu", why="the runtime computes x*sigmoid(1.7x)"
    )
    config.update(
        model_type="qwen2_vl",
        embed_dim=int(facts.size("embed_dim", 1280)),
        hidden_size=int(facts.size("hidden_size", 3584)),
        mlp_ratio=facts.number("mlp_ratio", 4),
    )
    _spell_common(config, facts)


def spell_qwen2_5(config: dict[str, Any], facts: Facts) -> None:
    """Write the Qwen2.5-VL tower's facts as the runtime reads them, in place."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    config.update(
        model_type="qwen2_5_vl",
        hidden_size=int(facts.size("hidden_size", 3584)),
        intermediate_size=int(facts.size("intermediate_size", 3420)),
        out_hidden_size=int(facts.size("out_hidden_size", 3584)),
        window_size=int(facts.size("window_size", 112)),
        fullatt_block_indexes=list(facts.data.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=int(facts.size("tokens_per_second", 4)),
    )
    _spell_common(config, facts)


def _inner(facts: Facts, hidden: Dim) -> Dim:
    return Dim(int(int(hidden) * facts.number("mlp_ratio", 4)), "embed_dim*mlp_ratio")


def _patches(at: Mount, facts: Facts, hidden: int) -> None:
    channels = facts.size("in_channels", 3)
    patch, frames = facts.size("patch_size", 14), facts.size("temporal_patch_size", 2)
    at.conv("patch_embed.proj", hidden, channels, frames, patch, patch)


def _attention(block: Mount, hidden: int) -> None:
    block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
    block.linear("attn.proj", hidden, hidden, bias=True)


def _merger(at: Mount, facts: Facts, hidden: Dim, out: int, *, norm_bias: bool) -> None:
    side = facts.size("spatial_merge_size", 2)
    merged = hidden * side * side
    merger = at.at(source="merger", target="merger", part="projector")
    merger.norm("ln_q", hidden, bias=norm_bias)
    merger.linear("mlp.0", merged, merged, bias=True)
    merger.linear("mlp.2", out, merged, bias=True)


def _spell_common(config: dict[str, Any], facts: Facts) -> None:
    facts.expect("in_channels", 3, default=3, why=_CHANNELS)
    config.update(
        depth=facts.count("depth", 32),
        num_heads=int(facts.size("num_heads", 16)),
        in_channels=3,
        patch_size=int(facts.size("patch_size", 14)),
        spatial_patch_size=int(facts.size("patch_size", 14)),
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        temporal_patch_size=int(facts.size("temporal_patch_size", 2)),
    )
