"""Falcon's picture input: patches projected straight into the decoder."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Mount

_SIZES: Final = {"spatial_patch_size": 16, "temporal_patch_size": 1, "channel_size": 3}


def patches(root: Mount, given: Facts) -> None:
    """The projector of patches; ``root`` is the whole release."""
    facts = given.filled(_SIZES)
    patch = facts.size("spatial_patch_size") ** 2 * facts.size("channel_size")
    at = root.at(source="", target="language_model.model", part="vision")
    at.linear("img_projector", facts.size("dim"), facts.size("temporal_patch_size") * patch)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write what a patch is, in place."""
    for name, value in _SIZES.items():
        config[name] = int(facts.size(name, value))
