"""What stands for a vision tower in Gemma 4 without encoders: norms and one layer over patches."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "output_proj_dims": 3840,
    "rms_norm_eps": 1e-6,
}
"""The reference's values."""


def embedder(at: Mount, facts: Facts) -> None:
    """Norms, the layer between them and positions by axis, below ``at``, from filled facts."""
    width, pixels = facts.size("mm_embed_dim"), 3 * _side(facts) * _side(facts)
    at.norm("patch_ln1", pixels, bias=True)
    at.linear("patch_dense", width, pixels, bias=True)
    at.norm("patch_ln2", width, bias=True)
    positions = facts.size("mm_posemb_size")
    at.tensor("pos_embedding", positions, 2, width, kind=Kind.POSITION)
    at.norm("pos_norm", width, bias=True)


def _side(facts: Facts) -> int:
    return facts.size("patch_size") * facts.size("pooling_kernel_size")


def spell_config(facts: Facts) -> dict[str, Any]:
    """The vision section as mlx-vlm reads it, from filled facts."""
    side = int(_side(facts))
    facts.expect("model_patch_size", side, default=side, why="the reference derives it")
    return {**facts.data, "model_type": "gemma4_unified_vision", "model_patch_size": side}
