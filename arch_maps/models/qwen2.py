"""Qwen1.5, Qwen2 and Qwen2.5 dense text models: Llama's stack with query, key and value biases."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, qkv_bias=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes attend to everything"
    facts.expect("use_sliding_window", False, default=False, why=why)
    out = spell.start(config)
    llama.spell_config(out, facts, _sizes(facts), max_positions=32768)
    out["rope_traditional"] = False
    return out


MAP = ArchMap(
    model_type="qwen2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
