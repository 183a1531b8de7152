"""MobileNetV5 as Gemma 3n has it: convolutions and attention over pixels, of one size in code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "architecture": "mobilenetv5_300m_enc",
    "hidden_size": 2048,
    "vocab_size": 128,
    "vocab_offset": 262144,
    "rms_norm_eps": 1e-6,
}
"""The reference's values."""

STEM: Final = 64
FUSED: Final = 2048
"""Channels of the features that the last two stages are joined to."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A full convolution to ``expand`` times the channels, and back by one of a pixel."""

    kernel: int
    out: int
    expand: int = 4


@dataclass(frozen=True, slots=True)
class Inverted:
    """Universal inverted residual: depthwise convolutions around an expansion; 0 is none."""

    start: int
    middle: int
    out: int
    expand: int = 4


@dataclass(frozen=True, slots=True)
class Attention:
    """Heads of queries over one head of keys and values, which may be halved in size."""

    heads: int
    size: int
    halved: bool


Block = Edge | Inverted | Attention

STAGES: Final[tuple[tuple[Block, ...], ...]] = (
    (Edge(3, 128), Edge(3, 128), Edge(3, 128)),
    (Inverted(3, 5, 256, 6), *(Inverted(kernel, 0, 256) for kernel in (5, 3, 5, 3))),
    (
        Inverted(5, 5, 640, 6),
        *(Inverted(5, 0, 640),) * 7,
        Inverted(0, 0, 640, 1),
        *(Attention(12, 64, halved=True), Inverted(0, 0, 640, 2)) * 14,
    ),
    (Inverted(5, 5, 1280, 6), *(Attention(16, 96, halved=False), Inverted(0, 0, 1280, 2)) * 19),
)
"""timm's mobilenetv5_300m_enc, which the runtime has in code as well."""


def tower(at: Mount, facts: Facts) -> None:
    """Stem, stages and the adapter that joins the last two, below ``at``."""
    why = "the runtime has no other tower"
    facts.expect("architecture", "mobilenetv5_300m_enc", default=None, why=why)
    facts.expect("hidden_size", FUSED, default=None, why=why)
    facts.expect("model_args", None, default=None, why=why)
    at.conv("conv_stem.conv", STEM, 3, 3, 3, bias=True)
    at.norm("conv_stem.bn", STEM)
    for name, block, inp, out in blocks():
        _block(at / name, block, inp, out)
    last = [_width(stage) for stage in STAGES[-2:]]
    _pointwise(at / "msfa.ffn", sum(last), 2 * sum(last), FUSED)
    at.norm("msfa.norm", FUSED)


def blocks() -> Iterator[tuple[str, Block, int, int]]:
    """Each block's name, what it is, and its channels in and out."""
    width = STEM
    for stage, members in enumerate(STAGES):
        for index, block in enumerate(members):
            out = width if isinstance(block, Attention) else block.out
            yield f"blocks.{stage}.{index}", block, width, out
            width = out


def _width(stage: tuple[Block, ...]) -> int:
    return next(block.out for block in reversed(stage) if not isinstance(block, Attention))


def _block(at: Mount, block: Block, inp: int, out: int) -> None:
    match block:
        case Edge(kernel, _, expand):
            at.conv("conv_exp", expand * inp, inp, kernel, kernel)
            at.norm("bn1", expand * inp)
            at.conv("conv_pwl", out, expand * inp, 1, 1)
            at.norm("bn2", out)
        case Inverted(start, middle, _, expand):
            if start:
                _depthwise(at / "dw_start", inp, start)
            if middle:
                _depthwise(at / "dw_mid", expand * inp, middle)
            _pointwise(at, inp, expand * inp, out)
            at.tensor("layer_scale.gamma", out, kind=Kind.NORM)
        case Attention(heads, size, halved):
            at.norm("norm", inp)
            at.conv("attn.query.proj", heads * size, inp, 1, 1)
            for name in ("key", "value"):
                part = at / f"attn.{name}"
                if halved:
                    part.conv("down_conv", inp, 1, 3, 3)
                    part.norm("norm", inp)
                part.conv("proj", size, inp, 1, 1)
            at.conv("attn.output.proj", out, heads * size, 1, 1)
            at.tensor("layer_scale.gamma", out, kind=Kind.NORM)


def _depthwise(at: Mount, width: int, kernel: int) -> None:
    at.conv("conv", width, 1, kernel, kernel)
    at.norm("bn", width)


def _pointwise(at: Mount, inp: int, middle: int, out: int) -> None:
    """Expansion and projection of each pixel by itself."""
    at.conv("pw_exp.conv", middle, inp, 1, 1)
    at.norm("pw_exp.bn", middle)
    at.conv("pw_proj.conv", out, middle, 1, 1)
    at.norm("pw_proj.bn", out)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The vision section as mlx-vlm reads it, from facts that are filled with the defaults."""
    return {**facts.data, "model_type": "gemma3n_vision"}
