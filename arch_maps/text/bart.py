"""BART's encoder and decoder: post-norm layers with learned positions and one vocabulary."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

_OFFSET: Final = 2
"""Rows of the position tables before the first position."""
_SHARED: Final = "shared by encoder, decoder and head; the runtime keeps it once"
DEFAULTS: Final = {
    "vocab_size": 50265,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
}
"""The reference's facts."""


def model(at: Mount, facts: Facts) -> None:
    """Vocabulary, encoder and decoder, below ``at``."""
    vocab, width = facts.size("vocab_size"), facts.size("d_model")
    same = int(facts.size("encoder_layers"))
    why = "it is another name of encoder_layers"
    facts.expect("num_hidden_layers", same, default=same, why=why)
    at.embedding("shared", vocab, width)
    table = at.input("shared.weight", vocab, width).name
    for side in ("encoder", "decoder"):
        stack = at / side
        stack.drop("embed_tokens.weight", _SHARED, vocab, width, same_as=table)
        positions = facts.size("max_position_embeddings") + _OFFSET
        stack.embedding("embed_positions", positions, width, kind=Kind.POSITION)
        inner = facts.size(f"{side}_ffn_dim")
        for _, layer in stack.layers("layers", facts.count(f"{side}_layers")):
            _attention(layer, "self_attn", width)
            if side == "decoder":
                _attention(layer, "encoder_attn", width)
            layer.linear("fc1", inner, width, bias=True)
            layer.linear("fc2", width, inner, bias=True)
            layer.norm("final_layer_norm", width, bias=True)
        stack.norm("layernorm_embedding", width, bias=True)


def _attention(layer: Mount, name: str, width: Dim) -> None:
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer.linear(f"{name}.{part}", width, width, bias=True)
    layer.norm(f"{name}_layer_norm", width, bias=True)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the stack's facts as the runtime reads them, in place."""
    facts.expect("activation_function", "gelu", default="gelu", why="the runtime computes GELU")
    for name in DEFAULTS:
        config[name] = int(facts.size(name))
    config.update(
        scale_embedding=facts.flag("scale_embedding", False),
        decoder_start_token_id=facts.data.get("decoder_start_token_id", 2),
        tie_word_embeddings=True,
    )
