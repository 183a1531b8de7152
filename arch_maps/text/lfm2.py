"""The LFM2 text stack: gated short convolutions with full attention in between."""

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
    inner: Dim
    layer_types: tuple[str, ...]
    heads: Dim
    kv_heads: Dim
    kernel: Dim
    conv_bias: bool

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // int(self.heads)


def sizes(facts: Facts) -> Sizes:
    """Read the sizes, with the reference's defaults."""
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=facts.size("hidden_size"),
        inner=_inner(facts),
        layer_types=_layer_types(facts, facts.count("num_hidden_layers")),
        heads=facts.size("num_attention_heads"),
        kv_heads=facts.size("num_key_value_heads", 8),
        kernel=facts.size("conv_L_cache", 3),
        conv_bias=facts.flag("conv_bias", False),
    )


def _stated_inner(facts: Facts) -> Dim:
    name = "block_ff_dim" if facts.data.get("block_ff_dim") else "intermediate_size"
    return facts.size(name, 12288)


def _inner(facts: Facts) -> Dim:
    """The MLP's width: two thirds of the stated one, rounded up, unless it is taken as it is."""
    stated = _stated_inner(facts)
    if not facts.flag("block_auto_adjust_ff_dim", True):
        return stated
    width = int(facts.number("block_ffn_dim_multiplier", 1.0) * int(2 * stated / 3))
    multiple = int(facts.size("block_multiple_of", 256))
    return Dim(multiple * -(-width // multiple), f"adjusted({stated.label})")


def _layer_types(facts: Facts, layers: int) -> tuple[str, ...]:
    kinds = facts.data.get("layer_types")
    if kinds is None:
        full = facts.data.get("full_attn_idxs")
        places = range(layers) if full is None else full
        kinds = ["full_attention" if index in places else "conv" for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        facts.problem(f"config.json: {facts.path}layer_types must list {layers} layers")
        return ("full_attention",) * layers
    return tuple(kinds)


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", len(s.layer_types)):
        operator(layer, s, s.layer_types[index])
        layer.linear("feed_forward.w1", s.inner, s.hidden)
        layer.linear("feed_forward.w3", s.inner, s.hidden)
        layer.linear("feed_forward.w2", s.hidden, s.inner)
        layer.norm("ffn_norm", s.hidden)
    at.norm("embedding_norm", s.hidden)


def operator(layer: Mount, s: Sizes, kind: str) -> None:
    """The half of a layer that mixes positions, with the norm before it."""
    layer.norm("operator_norm", s.hidden)
    if kind == "full_attention":
        attention = layer / "self_attn"
        attention.linear("q_proj", s.heads * s.head_dim, s.hidden)
        attention.linear("k_proj", s.kv_heads * s.head_dim, s.hidden)
        attention.linear("v_proj", s.kv_heads * s.head_dim, s.hidden)
        attention.linear("out_proj", s.hidden, s.heads * s.head_dim)
        attention.norm("q_layernorm", s.head_dim)
        attention.norm("k_layernorm", s.head_dim)
    else:
        conv = layer / "conv"
        conv.conv("conv", s.hidden, 1, s.kernel, bias=s.conv_bias)
        conv.linear("in_proj", 3 * s.hidden, s.hidden, bias=s.conv_bias)
        conv.linear("out_proj", s.hidden, s.hidden, bias=s.conv_bias)


def spell_config(config: dict[str, Any], facts: Facts, s: Sizes) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    rope = spell.rope(facts, default_theta=1e6)
    spell.require_rope_type(facts, rope, allowed=("default",))
    full = [index for index, kind in enumerate(s.layer_types) if kind == "full_attention"]
    if not full or len(full) == len(s.layer_types):
        facts.problem(f"config.json: {facts.path}layer_types lacks a kind; the runtimes need both")
    config.update(
        layer_types=list(s.layer_types),
        full_attn_idxs=full,
        num_key_value_heads=int(s.kv_heads),
        norm_eps=facts.number("norm_eps", 1e-5),
        conv_L_cache=int(s.kernel),
        conv_bias=s.conv_bias,
        block_dim=int(s.hidden),
        block_ff_dim=int(s.inner),
        intermediate_size=int(s.inner),
        block_auto_adjust_ff_dim=False,
        block_ffn_dim_multiplier=1.0,
        block_multiple_of=int(facts.size("block_multiple_of", 256)),
        max_position_embeddings=int(facts.size("max_position_embeddings", 128000)),
        tie_word_embeddings=True,
        **spell.spell_rope(rope),
    )
