"""The text stacks of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Llama's, with positions on three axes."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.text.llama import Sizes


def tied(root: Facts) -> bool:
    """Whether the head is tied: either level may say so, as the reference reads them."""
    nested = root.data.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    return root.flag("tie_word_embeddings", False) or inner is True


def spell_config(
    facts: Facts,
    s: Sizes,
    *,
    theta: float,
    eps: float,
    max_positions: int,
    is_tied: bool,
    section: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """The stack's facts under the names both runtimes read; the rest are reference defaults."""
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtimes compute SiLU whatever it says"
    )
    facts.expect(
        "use_sliding_window", False, default=False, why="the runtimes attend to everything"
    )
    settings = spell.rope(facts, default_theta=theta)
    if section is not None:
        settings.setdefault("mrope_section", list(section))
    if settings["rope_type"] not in ("default", "mrope"):
        facts.problem(
            f"config.json: {facts.path}rope_type is {settings['rope_type']!r}; the runtimes "
            "compute unscaled positions only"
        )
    if sum(settings.get("mrope_section") or ()) * 2 != s.head_dim:
        facts.problem(
            f"config.json: {facts.path}mrope_section must share out {int(s.head_dim) // 2} "
            f"frequencies, not {settings.get('mrope_section')!r}"
        )
    settings["rope_type"] = "default"
    spelled = spell.spell_rope(settings)
    spelled["rope_scaling"] = spelled["rope_parameters"]
    return {
        "vocab_size": int(s.vocab),
        "hidden_size": int(s.hidden),
        "intermediate_size": int(s.intermediate),
        "num_hidden_layers": s.layers,
        "num_attention_heads": int(s.heads),
        "num_key_value_heads": int(s.kv_heads),
        "head_dim": int(s.head_dim),
        "hidden_act": "silu",
        "rms_norm_eps": facts.number("rms_norm_eps", eps),
        "max_position_embeddings": int(facts.size("max_position_embeddings", max_positions)),
        "rope_traditional": False,
        "tie_word_embeddings": is_tied,
        "use_sliding_window": False,
        **spelled,
    }


def spell_tokens(config: dict[str, Any]) -> None:
    """Write the ids of the picture tokens, with the reference's defaults, in place."""
    config.setdefault("image_token_id", 151655)
    config.setdefault("video_token_id", 151656)
    config.setdefault("vision_start_token_id", 151652)
    config.setdefault("vision_end_token_id", 151653)
