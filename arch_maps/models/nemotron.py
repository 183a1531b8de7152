"""Nemotron-4 and Minitron: layer norms around one, squared ReLU, partially rotated heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts)
    return replace(found, plain_mlp=("up_proj", "down_proj"), norm_bias=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("hidden_act", "relu2", default="relu2", why="the runtimes compute squared ReLU")
    out = spell.start(config)
    s = _sizes(facts)
    rope = spell.rope(facts)
    rope.setdefault("partial_rotary_factor", 0.5)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out.update(
        hidden_act="relu2",
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        tie_word_embeddings=s.tied,
        norm_eps=facts.number("norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 4096)),
        rope_traditional=False,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="nemotron",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
