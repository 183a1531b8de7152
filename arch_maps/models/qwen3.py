"""Qwen3 dense text models: Llama's stack with per-head query and key norms."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect(
        "use_sliding_window", False, default=False, why="the runtimes attend to everything"
    )
    out = spell.start(config)
    llama.spell_config(out, facts, _sizes(facts), max_positions=32768)
    return out


MAP = ArchMap(
    model_type="qwen3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
