"""Seed-OSS: Llama's stack with biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=8, head_dim=128)
    qkv = facts.flag("attention_bias", True)
    return replace(found, qkv_bias=qkv, attention_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    why = "no release has this bias, so its layout is not known"
    facts.expect("attention_out_bias", False, default=False, why=why)
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=524288)
    out.update(
        attention_bias=s.qkv_bias,
        attention_out_bias=False,
        mlp_bias=s.mlp_bias,
        rope_traditional=False,
    )
    return out


MAP = ArchMap(
    model_type="seed_oss",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
