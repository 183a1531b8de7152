"""Kimi delta attention: a gated delta rule whose decay has a value per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arch_maps.facts import Facts
from arch_maps.ops import Concat, Permute
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the layer's shapes depend on."""

    hidden: int
    heads: int
    head_dim: int
    kernel: int


def attention(at: Mount, s: Sizes) -> None:
    """Projections, a convolution each for q, k and v, low-rank decay and output gates."""
    wide = s.heads * s.head_dim
    for name in ("q", "k", "v"):
        at.linear(f"{name}_proj", wide, s.hidden)
        kernel = at.input(f"{name}_conv1d.weight", wide, 1, s.kernel)
        at.rule(f"{name}_conv.conv.weight", Permute(kernel, (0, 2, 1)), Kind.CONV)
    for name in ("f", "g"):
        at.linear(f"{name}_a_proj", s.head_dim, s.hidden)
        at.linear(f"{name}_b_proj", wide, s.head_dim)
    at.linear("b_proj", s.heads, s.hidden, kind=Kind.GATE)
    at.tensor("A_log", 1, 1, s.heads, 1, kind=Kind.STATE)
    at.tensor("dt_bias", wide, kind=Kind.STATE)
    at.norm("o_norm", s.head_dim)
    at.linear("o_proj", s.hidden, wide)


def joined_attention(at: Mount, s: Sizes) -> None:
    """The same where the runtime joins q, k and v, and what is made of the input beside them."""
    wide = s.heads * s.head_dim
    qkv = dict.fromkeys(("q_proj", "k_proj", "v_proj"), wide)
    llama.joined(at, "qkv_proj", qkv, s.hidden)
    kernels = (at.input(f"{name}_conv1d.weight", wide, 1, s.kernel) for name in "qkv")
    moved = tuple(Permute(kernel, (0, 2, 1)) for kernel in kernels)
    at.rule("qkv_conv.conv.weight", Concat(moved), Kind.CONV)
    gates = {"f_a_proj": s.head_dim, "b_proj": s.heads, "g_a_proj": s.head_dim}
    llama.joined(at, "fbg_a_proj", gates, s.hidden, kind=Kind.GATE)
    for name in ("f_b_proj", "g_b_proj"):
        at.linear(name, wide, s.head_dim)
    at.tensor("A_log", s.heads, kind=Kind.STATE)
    at.tensor("dt_bias", wide, kind=Kind.STATE)
    at.norm("o_norm", s.head_dim)
    at.linear("o_proj", s.hidden, wide)


def direct_attention(at: Mount, s: Sizes) -> None:
    """The same with one projection each for the decay and the output gate."""
    wide = s.heads * s.head_dim
    for name in ("q", "k", "v"):
        at.linear(f"{name}_proj", wide, s.hidden)
        at.conv(f"{name}_conv1d", wide, 1, s.kernel)
    for name in ("f_proj", "g_proj"):
        at.linear(name, wide, s.hidden)
    at.linear("b_proj", s.heads, s.hidden, kind=Kind.GATE)
    at.tensor("A_log", s.heads, kind=Kind.STATE)
    at.tensor("dt_bias", wide, kind=Kind.STATE)
    at.norm("o_norm", s.head_dim)
    at.linear("o_proj", s.hidden, wide)


def released(facts: Facts, names: Mapping[str, tuple[str, ...]], **settings: Any) -> Facts:
    """The config under a release's ``names``, each with the others it goes by; and ``settings``."""
    found = {**facts.data, **settings}
    for name, others in names.items():
        stated = (found[other] for other in others if found.get(other) is not None)
        if found.get(name) is None and (value := next(stated, None)) is not None:
            found[name] = value
    return Facts(found, path=facts.path, parent=facts)
