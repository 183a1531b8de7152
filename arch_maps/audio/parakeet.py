"""The Parakeet encoder (Fast Conformer): strided convolutions, then blocks with relative positions.

Its names are the same in NVIDIA's omni releases, in transformers and in mlx-vlm.
"""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "hidden_act": "silu",
    "conv_kernel_size": 9,
    "subsampling_factor": 8,
    "subsampling_conv_channels": 256,
    "subsampling_conv_kernel_size": 3,
    "subsampling_conv_stride": 2,
    "num_mel_bins": 80,
    "max_position_embeddings": 5000,
    "convolution_bias": True,
    "attention_bias": True,
    "scale_input": True,
}
"""The reference's values."""
_FRONT: Final = {
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 512,
    "win_length": 400,
    "preemphasis": 0.97,
}
"""How the reference's feature extractor makes mel features, which the runtime does in its model."""
_NORMS: Final = (
    *("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2"),
    "norm_out",
)
_COUNTED: Final = "how many batches the norm saw in training; nothing reads it"
_MEL: Final = "the runtime computes its mel filters and its window"


def encoder(at: Mount, facts: Facts) -> None:
    """Convolutions and blocks, below ``at``, from filled facts."""
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    _subsampling(at / "subsampling", facts)
    biased, kernel = facts.flag("convolution_bias", True), facts.size("conv_kernel_size")
    heads, dense = facts.size("num_attention_heads"), facts.flag("attention_bias", True)
    for _, block in at.layers("layers", facts.count("num_hidden_layers")):
        for name in ("feed_forward1", "feed_forward2"):
            block.linear(f"{name}.linear1", inner, hidden, bias=dense)
            block.linear(f"{name}.linear2", hidden, inner, bias=dense)
        attention = block / "self_attn"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            attention.linear(name, hidden, hidden, bias=dense)
        attention.linear("relative_k_proj", hidden, hidden)
        for name in ("bias_u", "bias_v"):
            attention.tensor(name, heads, hidden // heads, kind=Kind.BIAS)
        conv = block / "conv"
        conv.conv("pointwise_conv1", 2 * hidden, hidden, 1, bias=biased)
        conv.conv("depthwise_conv", hidden, 1, kernel, bias=biased)
        conv.norm("norm", hidden, bias=True)
        conv.tensor("norm.running_mean", hidden, kind=Kind.BIAS)
        conv.tensor("norm.running_var", hidden, kind=Kind.NORM)
        conv.drop("norm.num_batches_tracked", _COUNTED)
        conv.conv("pointwise_conv2", hidden, hidden, 1, bias=biased)
        for name in _NORMS:
            block.norm(name, hidden, bias=True)


def _subsampling(at: Mount, facts: Facts) -> None:
    """Halvings of time and pitch: the first takes in all, the others go channel by channel."""
    channels, side = (
        facts.size("subsampling_conv_channels"),
        facts.size("subsampling_conv_kernel_size"),
    )
    stride, steps = facts.size("subsampling_conv_stride"), _halvings(facts)
    at.conv("layers.0", channels, 1, side, side, bias=True)
    for step in range(1, steps):
        at.conv(f"layers.{3 * step - 1}", channels, 1, side, side, bias=True)
        at.conv(f"layers.{3 * step}", channels, channels, 1, 1, bias=True)
    left = facts.size("num_mel_bins") // int(stride) ** steps
    at.linear("linear", facts.size("hidden_size"), channels * left, bias=True)


def _halvings(facts: Facts) -> int:
    return int(facts.size("subsampling_factor")).bit_length() - 1


def drop_features(at: Mount, facts: Facts, *, required: bool) -> None:
    """The filters and the window of mel features, which releases store with the encoder."""
    front = facts.filled(_FRONT)
    bins, width = front.size("num_mel_bins"), front.size("n_fft") // 2 + 1
    inside = at / "feature_extractor.featurizer"
    inside.drop("fb", _MEL, 1, int(bins), int(width), required=required)
    inside.drop("window", _MEL, int(front.size("win_length")), required=required)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The audio section as the runtime and transformers read it, from filled facts."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU only")
    factor, stride = facts.size("subsampling_factor"), facts.size("subsampling_conv_stride")
    if 2 ** _halvings(facts) != factor or stride != 2:
        facts.problem(
            f"config.json: {facts.path}subsampling_factor must be a power of two in steps of two: "
            "the runtime counts frames so"
        )
    front = facts.filled(_FRONT)
    bins = int(facts.size("num_mel_bins"))
    return {**front.data, "feat_in": bins}
