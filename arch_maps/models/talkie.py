"""Talkie 13B, whose release brings its own model code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import talkie

_EPS = 1.1920928955078125e-07
"""float32's own, which the release's norms take where none is stated."""


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    talkie.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    out.update(
        rope_theta=facts.number("rope_theta", 1e6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        rms_norm_eps=facts.number("rms_norm_eps", _EPS),
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="talkie",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-lm",),
    parts=("text.talkie",),
)
