"""Whisper's encoder: two convolutions over mel frames, learned positions, pre-norm layers."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def encoder(at: Mount, facts: Facts) -> None:
    """Convolutions, positions, layers and the last norm, below ``at``; keys have no bias."""
    hidden, inner = facts.size("d_model", 1024), facts.size("encoder_ffn_dim", 4096)
    at.conv("conv1", hidden, facts.size("num_mel_bins", 80), 3, bias=True)
    at.conv("conv2", hidden, hidden, 3, bias=True)
    positions = facts.size("max_source_positions", 1500)
    at.embedding("embed_positions", positions, hidden, kind=Kind.POSITION)
    for _, layer in at.layers("layers", facts.count("encoder_layers", 24)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.linear(f"self_attn.{name}", hidden, hidden, bias=name != "k_proj")
        layer.norm("self_attn_layer_norm", hidden, bias=True)
        layer.norm("final_layer_norm", hidden, bias=True)
        layer.linear("fc1", inner, hidden, bias=True)
        layer.linear("fc2", hidden, inner, bias=True)
    at.norm("layer_norm", hidden, bias=True)
