"""ERNIE 4.5 VL's tower: Qwen2-VL's blocks over flat patches of one frame, and a last norm."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount

WIDTH = 1280
"""The reference's width."""


def tower(at: Mount, facts: Facts) -> None:
    """Patches, blocks and the last norm, below ``at``."""
    hidden, patch = facts.size("hidden_size", WIDTH), facts.size("patch_size", 14)
    inner = Dim(int(int(hidden) * facts.number("mlp_ratio", 4)), "hidden_size*mlp_ratio")
    at.linear("patch_embed.proj", hidden, facts.size("in_channels", 3) * patch * patch)
    for _, block in at.layers("blocks", facts.count("depth", 32)):
        block.norm("norm1", hidden, bias=True)
        block.norm("norm2", hidden, bias=True)
        block.linear("attn.qkv", 3 * hidden, hidden, bias=True)
        block.linear("attn.proj", hidden, hidden, bias=True)
        block.linear("mlp.fc1", inner, hidden, bias=True)
        block.linear("mlp.fc2", hidden, inner, bias=True)
    at.norm("ln", hidden, bias=True)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    hidden = int(facts.size("hidden_size", WIDTH))
    why = "the runtime takes it for the tower's width"
    facts.expect("embed_dim", hidden, None, default=hidden, why=why)
    facts.expect(
        "hidden_act", "quick_gelu", default="quick_gelu", why="the reference's blocks compute it"
    )
    config.update(
        model_type="DFNRope_vision_transformer",
        depth=facts.count("depth", 32),
        embed_dim=hidden,
        hidden_size=hidden,
        hidden_act="quick_gelu",
        in_channels=int(facts.size("in_channels", 3)),
        layer_norm_eps=1e-6,
        mlp_ratio=facts.number("mlp_ratio", 4),
        num_heads=int(facts.size("num_heads", 16)),
        patch_size=int(facts.size("patch_size", 14)),
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
    )
