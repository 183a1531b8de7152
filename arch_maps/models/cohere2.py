"""Command R7B, Command A and Tiny Aya: Cohere's stack, every fourth layer without positions."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import cohere
from arch_maps.text.windows import interval, layer_types


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    why = "the runtimes have no query and key norms for this type"
    facts.expect("use_qk_norm", False, default=False, why=why)
    cohere.causal_lm(root, facts, cohere.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = cohere.sizes(facts)
    cohere.spell_config(out, facts, s, theta=10000.0)
    kinds = layer_types(facts, s.layers, pattern=int(facts.size("sliding_window_pattern", 4)))
    out.update(
        layer_types=kinds,
        sliding_window=int(facts.size("sliding_window", 4096)),
        sliding_window_pattern=interval(facts, kinds),
    )
    return out


MAP = ArchMap(
    model_type="cohere2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.cohere",),
)
