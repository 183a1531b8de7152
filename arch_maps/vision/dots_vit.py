"""The dots.ocr tower: RMS norms, gated MLPs, rotary positions, and a merger of four patches."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Mount

_DEFAULTS: Final = {
    "embed_dim": 1536,
    "hidden_size": 1536,
    "intermediate_size": 4224,
    "num_hidden_layers": 42,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 14,
    "post_norm": True,
    "rms_norm_eps": 1e-5,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "use_bias": False,
}
"""The reference's."""


def tower(at: Mount, given: Facts) -> None:
    """Patches, blocks and merger, below ``at``."""
    facts = given.filled(_DEFAULTS)
    width, inner = facts.size("embed_dim"), facts.size("intermediate_size")
    patch, bias = facts.size("patch_size"), facts.flag("use_bias", False)
    patches = at / "patch_embed.patchifier"
    patches.conv("proj", width, facts.size("num_channels"), patch, patch, bias=True)
    patches.norm("norm", width)
    for _, block in at.layers("blocks", facts.count("num_hidden_layers")):
        block.linear("attn.qkv", 3 * width, width, bias=bias)
        block.linear("attn.proj", width, width, bias=bias)
        block.norm("norm1", width)
        block.linear("mlp.fc1", inner, width, bias=bias)
        block.linear("mlp.fc2", width, inner, bias=bias)
        block.linear("mlp.fc3", inner, width, bias=bias)
        block.norm("norm2", width)
    if facts.flag("post_norm", True):
        at.norm("post_trunk_norm", width)
    merger = at.at(source="merger", target="merger", part="projector")
    wide = facts.size("spatial_merge_size") ** 2 * width
    merger.norm("ln_q", width, bias=True)
    merger.linear("mlp.0", wide, wide, bias=True)
    merger.linear("mlp.2", facts.size("hidden_size"), wide, bias=True)


def spell_config(config: dict[str, Any], given: Facts, hidden: int) -> None:
    """Write every setting of the tower, in place; ``hidden`` is the text stack's width."""
    facts = given.filled(_DEFAULTS)
    facts.expect("hidden_size", hidden, default=hidden, why="it is the text stack's width")
    facts.expect("temporal_patch_size", 1, default=1, why="the runtime takes one frame")
    facts.expect("is_causal", False, None, default=False, why="the runtime sees whole pictures")
    for name, value in _DEFAULTS.items():
        config[name] = given.data.get(name, value)
    config["model_type"] = "dots_vit"
