"""The Gemma text stacks: Llama's with scaled embeddings, (1 + weight) norms and GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Mount
from arch_maps.text import llama

SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""Norms before and after each half of a layer, from Gemma 2 on."""


def sizes(facts: Facts, *, kv_heads: int, sandwich: bool, qk_norm: bool = False) -> llama.Sizes:
    """Read the sizes; ``kv_heads`` is the reference's default."""
    found = llama.sizes(facts, kv_heads=kv_heads, head_dim=256, qk_norm=qk_norm, tied=True)
    return replace(found, norms=SANDWICH) if sandwich else found


def causal_lm(root: Mount, facts: Facts, s: llama.Sizes) -> None:
    """The stack and its head, which the runtimes take for tied and free of biases."""
    why = "the runtimes have no such biases"
    facts.expect("attention_bias", False, default=False, why=why)
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtimes reuse the input embedding"
    )
    llama.causal_lm(root, s)


def expect_causal(facts: Facts) -> None:
    """Attention both ways, as embedding models of this type have it, is another computation."""
    why = "the runtimes attend backwards only"
    facts.expect("use_bidirectional_attention", False, None, default=None, why=why)


def spell_config(
    config: dict[str, Any], facts: Facts, s: llama.Sizes, rope: dict[str, Any]
) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    expect_causal(facts)
    config.update(
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=True,
        attention_bias=False,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        rope_traditional=False,
        **spell.spell_rope(rope),
    )


def expect_tanh_gelu(facts: Facts, name: str = "hidden_activation") -> None:
    """The activation that the runtimes fix in code."""
    tanh = "gelu_pytorch_tanh"
    why = "the runtimes compute the tanh form of GELU whatever it says"
    facts.expect(name, tanh, default=tanh, why=why)
