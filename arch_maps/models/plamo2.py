"""PLaMo 2 (1B, 8B), whose releases bring their own model code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import plamo2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    plamo2.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("rope_theta", 10000, default=10000, why="the runtimes fix it in code")
    longest = int(facts.size("max_position_embeddings", 2048))
    window = int(facts.size("attention_window_size", 2048))
    if window < longest:
        facts.note(
            f"the release attends to the last {window} tokens in most layers; the runtimes attend "
            "to all of them, so results agree up to that length only"
        )
    kinds = plamo2.mamba_layers(facts)
    if all(kinds):
        facts.problem("config.json: mamba_step leaves no attention layer; the runtimes need one")
    sizes = {
        **{"hidden_size_per_head": 128, "num_key_value_heads": 4, "mamba_d_state": 64},
        **{"mamba_d_conv": 4, "mamba_num_heads": 64, "mamba_step": 2, "mamba_chunk_size": 256},
    }
    out = spell.start(config)
    out.update(
        {name: int(facts.size(name, default)) for name, default in sizes.items()},
        mamba_enabled=facts.flag("mamba_enabled", True),
        attention_window_size=window,
        full_attention_idx=facts.data.get("full_attention_idx"),
        max_position_embeddings=longest,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=facts.flag("tie_word_embeddings", True),
    )
    return out


MAP = ArchMap(
    model_type="plamo2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.plamo2",),
)
