"""The Gemma 3n audio tower: two strided convolutions, then Conformer blocks over short windows."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "vocab_size": 128,
    "vocab_offset": 262272,
    "input_feat_size": 128,
    "hidden_size": 1536,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "conf_attention_chunk_size": 12,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "conf_conv_kernel_size": 5,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": [128, 32],
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "sscp_conv_stride_size": [[2, 2], [2, 2]],
}
"""The reference's values."""

_SIDE: Final = 3
"""Rows and columns of a convolution's kernel."""


def tower(at: Mount, facts: Facts) -> None:
    """Convolutions and blocks, below ``at``."""
    for name, side in (("sscp_conv_kernel_size", _SIDE), ("sscp_conv_stride_size", 2)):
        if facts.data[name] != [[side] * 2] * 2:
            facts.problem(
                f"config.json: {facts.path}{name} must be {[[side] * 2] * 2}: the map knows "
                "kernels of 3 x 3 that move by 2 only"
            )
    hidden = facts.size("hidden_size")
    first, second = facts.pair("sscp_conv_channel_size", (128, 32))
    front = at / "subsample_conv_projection"
    bins = facts.size("input_feat_size")
    for index, (out, inp) in enumerate(((first, 1), (second, first))):
        front.conv(f"conv_{index}.conv", out, inp, _SIDE, _SIDE)
        front.norm(f"conv_{index}.norm", out)
        bins = (bins + 1) // 2
    front.linear("input_proj_linear", hidden, bins * second)
    for _, block in at.layers("conformer", facts.count("conf_num_hidden_layers")):
        for name in ("ffw_layer_start", "ffw_layer_end"):
            feed = block / name
            feed.linear("ffw_layer_1", 4 * hidden, hidden)
            feed.linear("ffw_layer_2", hidden, 4 * hidden)
            feed.norm("pre_layer_norm", hidden)
            feed.norm("post_layer_norm", hidden)
        _attention(block / "attention", facts)
        conv = block / "lconv1d"
        conv.linear("linear_start", 2 * hidden, hidden)
        conv.linear("linear_end", hidden, hidden)
        conv.conv("depthwise_conv1d", hidden, 1, facts.size("conf_conv_kernel_size"))
        conv.norm("pre_layer_norm", hidden)
        conv.norm("conv_norm", hidden)
        block.norm("norm", hidden)


def _attention(at: Mount, facts: Facts) -> None:
    hidden, heads = facts.size("hidden_size"), facts.size("conf_num_attention_heads")
    inner = at / "attn"
    for name in ("q_proj", "k_proj", "v_proj", "relative_position_embedding.pos_proj"):
        inner.linear(name, hidden, hidden)
    inner.tensor("per_dim_scale", hidden // heads, kind=Kind.NORM)
    at.linear("post", hidden, hidden)
    at.norm("pre_attn_norm", hidden)
    at.norm("post_norm", hidden)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The audio section as mlx-vlm reads it, from facts that are filled with the defaults."""
    return {
        **facts.data,
        "model_type": "gemma3n_audio",
        # The runtime's name for the epsilon of the norms between the convolutions.
        "sscp_conv_eps": facts.number("sscp_conv_group_norm_eps"),
        "conf_attention_invalid_logits_value": -1e9,
    }
