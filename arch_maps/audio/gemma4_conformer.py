"""The Gemma 4 audio tower: two strided convolutions, then Conformer blocks over short windows."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.vision.gemma4_vit import clippable

DEFAULTS: Final = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "residual_weight": 0.5,
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "attention_invalid_logits_value": -1e9,
    "use_clipped_linears": True,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "output_proj_dims": 1536,
}
"""The reference's values."""

MEL_BINS: Final = 128


def tower(at: Mount, facts: Facts) -> None:
    """Convolutions, blocks and the projection of their output, below ``at``."""
    hidden = facts.size("hidden_size")
    head = hidden // facts.size("num_attention_heads")
    clipped = facts.flag("use_clipped_linears", True)
    first, second = facts.pair("subsampling_conv_channels", (MEL_BINS, 32))
    front = at / "subsample_conv_projection"
    for name, out, inp in (("layer0", first, 1), ("layer1", second, first)):
        front.conv(f"{name}.conv", out, inp, 3, 3)
        front.norm(f"{name}.norm", out)
    front.linear("input_proj_linear", hidden, MEL_BINS // 4 * second)
    for _, block in at.layers("layers", facts.count("num_hidden_layers")):
        for name in ("feed_forward1", "feed_forward2"):
            feed = block / name
            clippable(feed / "ffw_layer_1", 4 * hidden, hidden, clipped=clipped)
            clippable(feed / "ffw_layer_2", hidden, 4 * hidden, clipped=clipped)
            feed.norm("pre_layer_norm", hidden)
            feed.norm("post_layer_norm", hidden)
        attention, conv = block / "self_attn", block / "lconv1d"
        for name in ("q_proj", "k_proj", "v_proj", "post"):
            clippable(attention / name, hidden, hidden, clipped=clipped)
        attention.linear("relative_k_proj", hidden, hidden)
        attention.tensor("per_dim_scale", head, kind=Kind.NORM)
        clippable(conv / "linear_start", 2 * hidden, hidden, clipped=clipped)
        clippable(conv / "linear_end", hidden, hidden, clipped=clipped)
        conv.conv("depthwise_conv1d", hidden, 1, facts.size("conv_kernel_size"))
        conv.norm("pre_layer_norm", hidden)
        conv.norm("conv_norm", hidden)
        for name in ("norm_pre_attn", "norm_post_attn", "norm_out"):
            block.norm(name, hidden)
    at.linear("output_proj", facts.size("output_proj_dims"), hidden, bias=True)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The audio section as mlx-vlm reads it, from facts that are filled with the defaults."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    channels = facts.pair("subsampling_conv_channels", (MEL_BINS, 32))
    if channels[0] != MEL_BINS:
        facts.problem(
            f"config.json: {facts.path}subsampling_conv_channels must start with {MEL_BINS}: the "
            "reference derives the width after the convolutions from it, the runtime from the "
            f"{MEL_BINS} bins of the spectrogram"
        )
    left = int(facts.size("attention_context_left"))
    why = "the runtime and the reference count relative positions otherwise"
    facts.expect("attention_chunk_size", left - 1, default=12, why=why)
    facts.expect("attention_context_right", 0, default=0, why=why)
    return {
        **facts.data,
        "model_type": "gemma4_audio",
        "subsampling_conv_channels": list(channels),
    }
