"""Phi-4 Multimodal's speech encoder: strided convolutions, then Conformer blocks with gates."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.ops import Permute, Reshape
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "attention_dim": 1024,
    "attention_heads": 16,
    "num_blocks": 24,
    "linear_units": 1536,
    "input_size": 80,
    "kernel_size": 3,
    "ext_pw_out_channel": 1024,
    "depthwise_seperable_out_channel": 1024,
}
"""The released sizes, which the runtime takes for those that a config leaves out."""
_FIXED: Final[dict[str, Any]] = {
    "time_reduction": 8,
    "depthwise_multiplier": 1,
    "ext_pw_kernel_size": 1,
    "causal": True,
    "batch_norm": False,
    "cnn_layer_norm": True,
    "bias_in_glu": True,
    "activation": "swish",
    "conv_activation": "swish",
    "conv_glu_type": "swish",
}
"""What there is but one of."""


def _filled(facts: Facts) -> Facts:
    for name, value in _FIXED.items():
        facts.expect(name, value, default=value, why="the runtime's encoder is of this kind only")
    found = facts.filled(DEFAULTS)
    for name in ("ext_pw_out_channel", "depthwise_seperable_out_channel"):
        width = int(found.size("attention_dim"))
        found.expect(name, width, default=width, why="the runtime adds what comes out to the input")
    return found


def _nested(facts: Facts, section: str, name: str, default: int) -> int:
    """A size that releases state in a section of its own, and the runtime beside the others."""
    at = facts.section(section) if section in facts.data else facts
    return at.size(name, default)


def encoder(at: Mount, stated: Facts) -> None:
    """Normalization, convolutions, table of distances and blocks, below ``at``."""
    facts = _filled(stated)
    width, bins = facts.size("attention_dim"), facts.size("input_size")
    at.tensor("encoder_embedding.global_mean", bins, kind=Kind.BIAS)
    at.tensor("encoder_embedding.global_invstd", bins, kind=Kind.NORM)
    channels = _nested(facts, "nemo_conv_settings", "conv_channels", 1024)
    front = at / "embed"
    for there, here, inp, kernel in (
        ("conv.0", "conv_0", 1, 3),
        ("conv.2", "dw_pw_layers.0.dw", 1, 3),
        ("conv.3", "dw_pw_layers.0.pw", channels, 1),
        ("conv.5", "dw_pw_layers.1.dw", 1, 3),
        ("conv.6", "dw_pw_layers.1.pw", channels, 1),
    ):
        layer = front.at(source=there, target=here)
        weight = layer.input("weight", channels, inp, kernel, kernel)
        layer.rule("weight", Permute(weight, (0, 2, 3, 1)), Kind.CONV)
        layer.tensor("bias", channels, kind=Kind.BIAS)
    front.linear("out", width, channels * -(-bins // 8), bias=True)
    distances = _nested(facts, "relative_attention_bias_args", "t5_bias_max_distance", 500)
    heads = facts.size("attention_heads")
    table = "relative_attention_bias_layer.bias_values"
    at.embedding(table, 2 * distances, heads, kind=Kind.POSITION)
    inner, kernel = facts.size("linear_units"), facts.size("kernel_size")
    for _, block in at.layers("encoders", facts.count("num_blocks")):
        for name in ("feed_forward_in", "feed_forward_out"):
            _feed_forward(block / name, width, inner)
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            block.linear(f"self_attn.{name}", width, width, bias=True)
        _convolution(block / "conv", width, kernel)
        block.norm("layer_norm_att", width, bias=True)
        block.norm("layer_norm", width, bias=True)


def _feed_forward(at: Mount, width: int, inner: int) -> None:
    at.norm("layer_norm", width, bias=True)
    at.at(source="net.0", target="net_0").linear("linear", 2 * inner, width, bias=True)
    down = at.at(source="net.2", target="net_2")
    down.tensor("weight", width, inner, kind=Kind.LINEAR)
    down.tensor("bias", width, kind=Kind.BIAS)


def _convolution(at: Mount, width: int, kernel: int) -> None:
    at.norm("layer_norm", width, bias=True)
    _pointwise(at / "glu", 2 * width, width)
    for name in ("glu.b1", "glu.b2"):
        at.rule(name, Reshape(at.input(name, 1, width, 1), (width,)), Kind.BIAS)
    at.conv("dw_sep_conv_1d.dw_conv", width, 1, kernel, bias=True)
    at.conv("dw_sep_conv_1d.pw_conv", width, width, 1, bias=True)
    _pointwise(at, width, width)


def _pointwise(at: Mount, out: int, inp: int) -> None:
    """A convolution over one frame, which the runtime has as a dense layer."""
    name = "ext_pw_conv_1d"
    weight = at.input(f"{name}.weight", out, inp, 1)
    at.rule(f"{name}.weight", Reshape(weight, (out, inp)), Kind.LINEAR)
    at.tensor(f"{name}.bias", out, kind=Kind.BIAS)


def spell_config(config: dict[str, Any], stated: Facts) -> None:
    """Write the encoder's facts under the names that the runtime reads, in place."""
    facts = _filled(stated)
    config.update(_FIXED)
    config.update({name: facts.data[name] for name in DEFAULTS})
    config.update(
        conv_channels=int(_nested(facts, "nemo_conv_settings", "conv_channels", 1024)),
        t5_bias_max_distance=int(
            _nested(facts, "relative_attention_bias_args", "t5_bias_max_distance", 500)
        ),
        chunk_size=facts.data.get("chunk_size", -1),
        left_chunk=facts.data.get("left_chunk", 18),
    )
