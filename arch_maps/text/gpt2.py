"""The GPT-2 text stack: learned positions, biased layer norms, fused query, key and value."""

from __future__ import annotations

from dataclasses import dataclass

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Permute
from arch_maps.rules import Kind, Mount

_MASK = "the causal mask, which the runtimes build themselves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    inner: Dim
    layers: int
    positions: Dim


def sizes(facts: Facts) -> Sizes:
    """Read the sizes; the inner width is four times the hidden one unless stated."""
    hidden = facts.size("n_embd")
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=hidden,
        inner=facts.size("n_inner", 4 * int(hidden)),
        layers=facts.count("n_layer"),
        positions=facts.size("n_positions"),
    )


def stack(at: Mount, s: Sizes, *, fused: int, transposed: bool) -> None:
    """Tables, layers and final norm, below ``at``.

    ``fused``: width of the fused projection. ``transposed``: projections stored [in, out].
    """
    at.embedding("wte", s.vocab, s.hidden)
    at.embedding("wpe", s.positions, s.hidden, kind=Kind.POSITION)
    for _, layer in at.layers("h", s.layers):
        for name, out, inp in (
            ("attn.c_attn", fused, s.hidden),
            ("attn.c_proj", s.hidden, s.hidden),
            ("mlp.c_fc", s.inner, s.hidden),
            ("mlp.c_proj", s.hidden, s.inner),
        ):
            if transposed:
                weight = Permute(layer.input(f"{name}.weight", inp, out), (1, 0))
                layer.rule(f"{name}.weight", weight, Kind.LINEAR)
                layer.tensor(f"{name}.bias", out, kind=Kind.BIAS)
            else:
                layer.linear(name, out, inp, bias=True)
        layer.norm("ln_1", s.hidden, bias=True)
        layer.norm("ln_2", s.hidden, bias=True)
        layer.drop("attn.bias", _MASK)
        layer.drop("attn.masked_bias", _MASK)
    at.norm("ln_f", s.hidden, bias=True)
