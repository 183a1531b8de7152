"""ERNIE 4.5 VL's resampler: two by two patches, then two frames, become one token."""

from __future__ import annotations

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount

FRAMES = 2
"""Frames that become one, which the reference and the runtime have in their code."""


def resampler(at: Mount, facts: Facts, *, patch: Dim, hidden: Dim) -> None:
    """Two MLPs with a norm each, a projection to [hidden] and its norm, below ``at``."""
    side = facts.size("spatial_conv_size", 2)
    wide = side * side * patch
    for name, inp in (("spatial_linear", wide), ("temporal_linear", FRAMES * wide)):
        steps = at.at(source=name, target=f"{name}.layers")
        steps.linear("0", wide, inp, bias=True)
        steps.linear("2", wide, wide, bias=True)
        steps.norm("3", wide, bias=True)
    at.linear("mlp", hidden, wide, bias=True)
    at.norm("after_norm", hidden)
