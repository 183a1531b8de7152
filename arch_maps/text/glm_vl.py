"""The text stacks of GLM-4.1V, 4.5V and 4.6V: positions on three axes over a part of each head."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.text import llama


def spell_config(
    config: dict[str, Any],
    facts: Facts,
    s: llama.Sizes,
    *,
    partial: float,
    max_positions: int,
) -> None:
    """Write the stack's facts as the runtime reads them, in place; the rest are defaults."""
    llama.expect_silu(facts)
    settings = spell.rope(facts)
    settings.setdefault("partial_rotary_factor", partial)
    settings.setdefault("mrope_section", [8, 12, 12])
    spell.require_rope_type(facts, settings, allowed=("default", "mrope"))
    settings["rope_type"] = "default"
    rotated = int(int(s.head_dim) * settings["partial_rotary_factor"])
    if sum(settings["mrope_section"]) * 2 != rotated:
        facts.problem(
            f"config.json: {facts.path}mrope_section must share out {rotated // 2} frequencies, "
            f"not {settings['mrope_section']!r}"
        )
    config.update(
        attention_bias=s.qkv_bias,
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", max_positions)),
        tie_word_embeddings=False,
        **spell.spell_rope(settings),
    )
    config["rope_scaling"] = config["rope_parameters"]


def spell_tokens(config: dict[str, Any]) -> None:
    """Write the ids of the picture tokens under every name, in place."""
    given = {"image_token_id": 151343, "video_token_id": 151344}
    for name, default in {**given, "image_start_token_id": 151339}.items():
        config.setdefault(name, default)
    config.setdefault("image_end_token_id", 151340)
    config.update(
        image_token_index=config["image_token_id"],
        video_token_index=config["video_token_id"],
        vision_start_token_id=config["image_start_token_id"],
        vision_end_token_id=config["image_end_token_id"],
    )
