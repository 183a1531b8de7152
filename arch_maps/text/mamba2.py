"""The Mamba-2 mixer: one projection, one depthwise convolution, a gated recurrence per head."""

from __future__ import annotations

from dataclasses import dataclass

from arch_maps.rules import Kind, Mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the mixer's shapes depend on."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    conv_bias: bool
    proj_bias: bool


def mixer(at: Mount, s: Sizes) -> None:
    """Projection to gate, convolved input and step sizes; recurrence; gated norm; output."""
    inner = s.heads * s.head_dim
    convolved = inner + 2 * s.groups * s.state
    at.linear("in_proj", inner + convolved + s.heads, s.hidden, bias=s.proj_bias)
    at.conv("conv1d", convolved, 1, s.kernel, bias=s.conv_bias)
    for name in ("dt_bias", "A_log", "D"):
        at.tensor(name, s.heads, kind=Kind.STATE)
    at.norm("norm", inner)
    at.linear("out_proj", s.hidden, inner, bias=s.proj_bias)
