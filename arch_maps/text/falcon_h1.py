"""The Falcon-H1 text stack: attention and a Mamba-2 mixer side by side in every layer.

The runtimes have no multipliers but fold them into the weights, and so does this part.
"""

from __future__ import annotations

from collections.abc import Sequence

from arch_maps.facts import Facts
from arch_maps.ops import Affine, Concat, Expr, Slice, Source
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama, mamba2


def _times(x: Expr, scale: float) -> Expr:
    return x if scale == 1.0 else Affine(x, scale)


def _linear(
    at: Mount, name: str, out: int, inp: int, *, before: float = 1.0, after: float, bias: bool
) -> None:
    """A projection whose input was scaled by ``before`` and its output by ``after``."""
    weight = at.input(f"{name}.weight", out, inp)
    at.rule(f"{name}.weight", _times(weight, before * after), Kind.LINEAR)
    if bias:
        at.rule(f"{name}.bias", _times(at.input(f"{name}.bias", out), after), Kind.BIAS)


def mamba(facts: Facts) -> mamba2.Sizes:
    """The mixer's sizes, with the reference's defaults."""
    hidden, heads = facts.size("hidden_size"), facts.size("mamba_n_heads", 128)
    inner = facts.size("mamba_d_ssm", 1024)
    stated = facts.data.get("mamba_d_head", "auto")
    return mamba2.Sizes(
        hidden=hidden,
        heads=heads,
        head_dim=inner // int(heads) if stated in ("auto", None) else facts.size("mamba_d_head"),
        groups=facts.size("mamba_n_groups", 1),
        state=facts.size("mamba_d_state", 256),
        kernel=facts.size("mamba_d_conv", 4),
        conv_bias=facts.flag("mamba_conv_bias", True),
        proj_bias=facts.flag("mamba_proj_bias", False),
    )


def multipliers(facts: Facts, name: str, count: int) -> list[float]:
    """The list ``name`` of multipliers, all one where it is not stated."""
    found = facts.data.get(name) or [1.0] * count
    numbers = isinstance(found, list) and all(type(value) in (int, float) for value in found)
    if not numbers or len(found) != count:
        facts.problem(f"config.json: {facts.path}{name} must list {count} numbers")
        return [1.0] * count
    return [float(value) for value in found]


def _segments(x: Source, sizes: Sequence[int], scales: Sequence[float]) -> Expr:
    """``x`` cut along its rows, each piece with a scale of its own."""
    parts, at = [], 0
    for size, scale in zip(sizes, scales, strict=True):
        parts.append(_times(Slice(x, 0, at, at + int(size)), scale))
        at += int(size)
    return Concat(tuple(parts))


def _mixer(at: Mount, facts: Facts, m: mamba2.Sizes) -> None:
    """The Mamba-2 mixer: gate, convolved input, both state projections and step sizes scaled."""
    inner, state = m.heads * m.head_dim, m.groups * m.state
    pieces = (inner, inner, state, state, m.heads)
    scales = multipliers(facts, "ssm_multipliers", 5)
    before = facts.number("ssm_in_multiplier", 1.0)
    weight = at.input("in_proj.weight", sum(pieces), m.hidden)
    both = [before * scale for scale in scales]
    at.rule("in_proj.weight", _segments(weight, pieces, both), Kind.LINEAR)
    if m.proj_bias:
        bias = at.input("in_proj.bias", sum(pieces))
        at.rule("in_proj.bias", _segments(bias, pieces, scales), Kind.BIAS)
    at.conv("conv1d", inner + 2 * state, 1, m.kernel, bias=m.conv_bias)
    for name in ("dt_bias", "A_log", "D"):
        at.tensor(name, m.heads, kind=Kind.STATE)
    if facts.flag("mamba_rms_norm", False):
        at.norm("norm", inner)
    out, bias_out = facts.number("ssm_out_multiplier", 1.0), facts.flag("projectors_bias", False)
    _linear(at, "out_proj", m.hidden, inner, after=out, bias=bias_out)


def _attention(at: Mount, facts: Facts, s: llama.Sizes) -> None:
    before, bias = facts.number("attention_in_multiplier", 1.0), s.attention_bias
    for name, heads, after in (
        ("q_proj", s.heads, 1.0),
        ("k_proj", s.kv_heads, facts.number("key_multiplier", 1.0)),
        ("v_proj", s.kv_heads, 1.0),
    ):
        width = heads * s.head_dim
        _linear(at, name, width, s.hidden, before=before, after=after, bias=bias)
    out = facts.number("attention_out_multiplier", 1.0)
    _linear(at, "o_proj", s.hidden, s.heads * s.head_dim, after=out, bias=bias)


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head, with every multiplier folded into a weight."""
    s, m = llama.sizes(facts, kv_heads=8), mamba(facts)
    gate, down = multipliers(facts, "mlp_multipliers", 2)
    model = root / "model"
    table = model.input("embed_tokens.weight", s.vocab, s.hidden)
    scaled = _times(table, facts.number("embedding_multiplier", 1.0))
    model.rule("embed_tokens.weight", scaled, Kind.EMBEDDING)
    for _index, layer in model.layers("layers", s.layers):
        _attention(layer / "self_attn", facts, s)
        _mixer(layer / "mamba", facts, m)
        block = layer / "feed_forward"
        _linear(block, "gate_proj", s.intermediate, s.hidden, after=gate, bias=s.mlp_bias)
        block.linear("up_proj", s.intermediate, s.hidden, bias=s.mlp_bias)
        _linear(block, "down_proj", s.hidden, s.intermediate, after=down, bias=s.mlp_bias)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("pre_ff_layernorm", s.hidden)
    model.norm("final_layernorm", s.hidden)
    if s.tied:
        root.head("lm_head", s.vocab, s.hidden, tied_to=table.name)
    else:
        head = root.input("lm_head.weight", s.vocab, s.hidden)
        head_scale = facts.number("lm_head_multiplier", 1.0)
        root.rule("lm_head.weight", _times(head, head_scale), Kind.HEAD)
