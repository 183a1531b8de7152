"""The Llama text stack, which Mistral and Qwen3 share: GQA attention, gated MLP, RMS norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.rules import Mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    layers: int
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False


def sizes(
    facts: Facts, *, kv_heads: int | None = None, head_dim: int | None = None, qk_norm: bool = False
) -> Sizes:
    """Read the sizes; the arguments are the reference's defaults where they are not derived."""
    hidden = facts.size("hidden_size")
    heads = facts.size("num_attention_heads")
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=hidden,
        intermediate=facts.size("intermediate_size"),
        layers=facts.count("num_hidden_layers"),
        heads=heads,
        kv_heads=facts.size("num_key_value_heads", kv_heads or int(heads)),
        head_dim=facts.size("head_dim", head_dim or int(hidden) // int(heads) or 1),
        attention_bias=facts.flag("attention_bias", False),
        mlp_bias=facts.flag("mlp_bias", False),
        qk_norm=qk_norm,
        tied=facts.flag("tie_word_embeddings", False),
    )


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, decoder layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for _, layer in at.layers("layers", s.layers):
        attention(layer / "self_attn", s)
        gated_mlp(layer / "mlp", s.hidden, s.intermediate, bias=s.mlp_bias)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    at.norm("norm", s.hidden)


def attention(at: Mount, s: Sizes) -> None:
    """Grouped-query attention, with per-head norms where ``qk_norm``."""
    bias = s.attention_bias
    at.linear("q_proj", s.heads * s.head_dim, s.hidden, bias=bias)
    at.linear("k_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear("v_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear("o_proj", s.hidden, s.heads * s.head_dim, bias=bias)
    if s.qk_norm:
        at.norm("q_norm", s.head_dim)
        at.norm("k_norm", s.head_dim)


def gated_mlp(at: Mount, hidden: int, intermediate: int, *, bias: bool = False) -> None:
    """``down(act(gate(x)) * up(x))``."""
    at.linear("gate_proj", intermediate, hidden, bias=bias)
    at.linear("up_proj", intermediate, hidden, bias=bias)
    at.linear("down_proj", hidden, intermediate, bias=bias)


def causal_lm(root: Mount, s: Sizes) -> None:
    """A text-only release: the stack under ``model`` and the head beside it."""
    stack(root / "model", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def spell_config(config: dict[str, Any], facts: Facts, s: Sizes, *, max_positions: int) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtimes compute SiLU whatever it says"
    )
    settings = spell.rope(facts)
    spell.require_rope_type(facts, settings)
    config.update(
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", max_positions)),
        **spell.spell_rope(settings),
    )
