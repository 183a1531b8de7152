"""Gemma 1: the 2B and 7B releases and their code models."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma, llama


def _sizes(facts: Facts) -> llama.Sizes:
    return gemma.sizes(facts, kv_heads=16, sandwich=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    gemma.causal_lm(root, facts, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    tanh = "gelu_pytorch_tanh"
    facts.expect("hidden_act", "gelu", tanh, default=tanh, why="the runtimes compute exact GELU")
    out = spell.start(config)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    gemma.spell_config(out, facts, _sizes(facts), rope)
    return out


MAP = ArchMap(
    model_type="gemma",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma",),
    remarks=("Both runtimes compute exact GELU where most releases mean its tanh form.",),
)
