"""Lille 130M, whose release brings its own model code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import lille


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    lille.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("tie_word_embeddings", True, default=True, why="the runtimes reuse the table")
    out = spell.start(config)
    out.update(
        block_size=int(facts.size("block_size", 512)),
        layer_norm_eps=facts.number("layer_norm_eps", 1e-5),
        rope_theta=facts.number("rope_theta", 10000.0),
        tie_word_embeddings=True,
    )
    return out


MAP = ArchMap(
    model_type="lille-130m",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.lille",),
)
