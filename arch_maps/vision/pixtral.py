"""The Pixtral vision tower: pictures of any shape, rotary positions on two axes, gated MLPs."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Mount
from arch_maps.text.llama import gated_mlp

DEFAULTS: Final = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
}
"""The reference's sizes."""


def tower(at: Mount, given: Facts) -> None:
    """Patches, layers and the norm before them, below ``at``."""
    facts = given.filled(DEFAULTS)
    hidden, patch = facts.size("hidden_size"), facts.size("patch_size")
    at.conv("patch_conv", hidden, facts.size("num_channels"), patch, patch)
    at.norm("ln_pre", hidden)
    for _, layer in at.layers("transformer.layers", facts.count("num_hidden_layers")):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.linear(f"attention.{name}", hidden, hidden)
        gated_mlp(layer / "feed_forward", hidden, facts.size("intermediate_size"))
        layer.norm("attention_norm", hidden)
        layer.norm("ffn_norm", hidden)


def spell_config(config: dict[str, Any], given: Facts) -> None:
    """Write the tower's facts as the runtimes read them, in place."""
    facts = given.filled(DEFAULTS)
    # The reference's default is GELU, but every release has a gated SiLU.
    facts.expect("hidden_act", "silu", default="gelu", why="the runtime computes SiLU")
    for name, value in DEFAULTS.items():
        config.setdefault(name, value)
    rope = spell.rope(facts)
    config.update(
        model_type="pixtral",
        head_dim=int(facts.size("hidden_size")) // int(facts.size("num_attention_heads")),
        rms_norm_eps=1e-5,
        rope_theta=rope["rope_theta"],
    )
