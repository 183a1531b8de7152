"""Qwen3-Omni's audio tower: three strided convolutions, then pre-norm layers over windows."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Mount

DEFAULTS: Final = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "activation_function": "gelu",
    "scale_embedding": False,
    "max_source_positions": 1500,
    "n_window": 50,
    "n_window_infer": 800,
    "conv_chunksize": 500,
    "output_dim": 3584,
    "downsample_hidden_size": 480,
}
"""The reference's values."""


def tower(at: Mount, facts: Facts) -> None:
    """Convolutions, layers and the projection to the text stack, from filled facts."""
    hidden, inner = facts.size("d_model"), facts.size("encoder_ffn_dim")
    cut = facts.size("downsample_hidden_size")
    for name, inp in (("conv2d1", 1), ("conv2d2", cut), ("conv2d3", cut)):
        at.conv(name, cut, inp, 3, 3, bias=True)
    bins = int(facts.size("num_mel_bins"))
    for _ in range(3):
        bins = (bins + 1) // 2
    at.linear("conv_out", hidden, cut * bins)
    for _, layer in at.layers("layers", facts.count("encoder_layers")):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.linear(f"self_attn.{name}", hidden, hidden, bias=True)
        layer.norm("self_attn_layer_norm", hidden, bias=True)
        layer.norm("final_layer_norm", hidden, bias=True)
        layer.linear("fc1", inner, hidden, bias=True)
        layer.linear("fc2", hidden, inner, bias=True)
    at.norm("ln_post", hidden, bias=True)
    at.linear("proj1", hidden, hidden, bias=True)
    at.linear("proj2", facts.size("output_dim"), hidden, bias=True)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The audio section as mlx-vlm reads it, from filled facts."""
    facts.expect("activation_function", "gelu", default="gelu", why="the runtime has GELU alone")
    facts.expect("n_window", 50, default=50, why="the runtime counts frames by hundreds")
    facts.expect("scale_embedding", False, default=False, why="the runtime does not scale")
    return {
        **facts.data,
        "model_type": "qwen3_omni_moe_audio_encoder",
        "num_hidden_layers": facts.count("encoder_layers"),
    }
