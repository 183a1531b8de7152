"""The Cohere text stack: attention and gated MLP side by side, after one norm without a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama


def sizes(facts: Facts) -> llama.Sizes:
    """Read the sizes, with the reference's defaults."""
    found = llama.sizes(facts, tied=True)
    return replace(found, norms=("input_layernorm",), mlp_bias=False)


def causal_lm(root: Mount, facts: Facts, s: llama.Sizes) -> None:
    """The stack and its head, which the runtimes take for tied; norms per head where it has any."""
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtimes reuse the input embedding"
    )
    llama.causal_lm(root, s)
    if facts.flag("use_qk_norm", False):
        for _, layer in (root / "model").layers("layers", s.layers):
            layer.tensor("self_attn.q_norm.weight", s.heads, s.head_dim, kind=Kind.NORM)
            layer.tensor("self_attn.k_norm.weight", s.kv_heads, s.head_dim, kind=Kind.NORM)


def spell_config(config: dict[str, Any], facts: Facts, s: llama.Sizes, *, theta: float) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    llama.expect_silu(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = spell.rope(facts, default_theta=theta)
    spell.require_rope_type(facts, rope, allowed=("default",))
    config.update(
        attention_bias=s.attention_bias,
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=True,
        layer_norm_eps=facts.number("layer_norm_eps", 1e-5),
        layer_norm_bias=False,
        logit_scale=facts.number("logit_scale", 0.0625),
        max_position_embeddings=int(facts.size("max_position_embeddings", 8192)),
        **spell.spell_rope(rope),
    )
