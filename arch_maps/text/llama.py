"""The Llama text stack, which Mistral and Qwen3 share: GQA attention, gated MLP, RMS norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.ops import Concat
from arch_maps.rules import Kind, Mount

DEFAULTS: Final = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
"""The reference's sizes, for multimodal releases that leave them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    layers: int
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    attention_bias: bool = False
    qkv_bias: bool = False
    """Biases on the query, key and value projections alone, as Qwen2 has them."""
    output: str = "o_proj"
    mlp_bias: bool = False
    fused_mlp: bool = False
    """Whether gate and up projection are one tensor, the gate first."""
    plain_mlp: tuple[str, str] | None = None
    """Names of the two projections where the MLP has no gate."""
    qk_norm: bool = False
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    wide_qk_norm: bool = False
    """Whether the query and key norms span all heads instead of one."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    final_norm: str = "norm"
    tied: bool = False


def sizes(
    facts: Facts,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    tied: bool = False,
) -> Sizes:
    """Read the sizes; the arguments are the reference's defaults where they are not derived."""
    hidden = facts.size("hidden_size")
    heads = facts.size("num_attention_heads")
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=hidden,
        intermediate=facts.size("intermediate_size"),
        layers=facts.count("num_hidden_layers"),
        heads=heads,
        kv_heads=facts.size("num_key_value_heads", kv_heads or int(heads)),
        head_dim=facts.size("head_dim", head_dim or int(hidden) // int(heads) or 1),
        attention_bias=facts.flag("attention_bias", False),
        qkv_bias=qkv_bias,
        mlp_bias=facts.flag("mlp_bias", False),
        qk_norm=qk_norm,
        tied=facts.flag("tie_word_embeddings", tied),
    )


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, decoder layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for _, layer in at.layers("layers", s.layers):
        attention(layer / "self_attn", s)
        mlp(layer / "mlp", s)
        for name in s.norms:
            layer.norm(name, s.hidden, bias=s.norm_bias)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    at.norm(s.final_norm, s.hidden, bias=s.norm_bias)


def attention(at: Mount, s: Sizes) -> None:
    """Grouped-query attention, with per-head norms where ``qk_norm``."""
    bias = s.attention_bias or s.qkv_bias
    at.linear("q_proj", s.heads * s.head_dim, s.hidden, bias=bias)
    at.linear("k_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear("v_proj", s.kv_heads * s.head_dim, s.hidden, bias=bias)
    at.linear(s.output, s.hidden, s.heads * s.head_dim, bias=s.attention_bias)
    norms = s.qk_norms if s.qk_norm else ()
    at.linear_values("v_proj", s.output, head=s.head_dim, beside=("q_proj", "k_proj", *norms))
    if s.qk_norm:
        for name, heads in zip(s.qk_norms, (s.heads, s.kv_heads), strict=True):
            at.norm(name, heads * s.head_dim if s.wide_qk_norm else s.head_dim)


def mlp(at: Mount, s: Sizes) -> None:
    """The layer's MLP as the sizes say: gated, gated from one tensor, or plain."""
    if s.plain_mlp:
        rise, fall = s.plain_mlp
        at.linear(rise, s.intermediate, s.hidden, bias=s.mlp_bias)
        at.linear(fall, s.hidden, s.intermediate, bias=s.mlp_bias)
    elif s.fused_mlp:
        at.linear("gate_up_proj", 2 * s.intermediate, s.hidden, bias=s.mlp_bias)
        at.linear("down_proj", s.hidden, s.intermediate, bias=s.mlp_bias)
    else:
        gated_mlp(at, s.hidden, s.intermediate, bias=s.mlp_bias)


def gated_mlp(at: Mount, hidden: int, intermediate: int, *, bias: bool = False) -> None:
    """``down(act(gate(x)) * up(x))``."""
    at.linear("gate_proj", intermediate, hidden, bias=bias)
    at.linear("up_proj", intermediate, hidden, bias=bias)
    at.linear("down_proj", hidden, intermediate, bias=bias)


def joined(
    at: Mount,
    name: str,
    parts: Mapping[str, int],
    hidden: int,
    *,
    bias: bool = False,
    kind: Kind = Kind.LINEAR,
) -> None:
    """Projections of the same input that the runtime makes by one, row under row.

    ``parts`` are the source's names with their rows.
    """
    weights = tuple(at.input(f"{part}.weight", rows, hidden) for part, rows in parts.items())
    at.rule(f"{name}.weight", Concat(weights), kind)
    if bias:
        biases = tuple(at.input(f"{part}.bias", rows) for part, rows in parts.items())
        at.rule(f"{name}.bias", Concat(biases), Kind.BIAS)


def joined_mlp(at: Mount, hidden: int, intermediate: int) -> None:
    """The gated MLP where the runtime makes gate and up by one projection."""
    joined(at, "gate_up_proj", dict.fromkeys(("gate_proj", "up_proj"), intermediate), hidden)
    at.linear("down_proj", hidden, intermediate)


def causal_lm(root: Mount, s: Sizes) -> None:
    """A text-only release: the stack under ``model`` and the head beside it."""
    stack(root / "model", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def expect_silu(facts: Facts) -> None:
    """The gated MLP's activation, which the runtimes fix in code."""
    facts.expect(
        "hidden_act", "silu", default="silu", why="the runtimes compute SiLU whatever it says"
    )


def spell_config(
    config: dict[str, Any],
    facts: Facts,
    s: Sizes,
    *,
    max_positions: int,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    theta: float = 10000.0,
    partial: float | None = None,
    rope_types: tuple[str, ...] = spell.NATIVE_ROPE_TYPES,
) -> None:
    """Write the stack's facts under the names both runtimes read, in place.

    The keywords are the reference's defaults (``partial``: of the rotated fraction of a head, for
    types that have one), and the position scalings that this type's runtime modules compute.
    """
    expect_silu(facts)
    settings = spell.rope(facts, default_theta=theta)
    if partial is not None:
        settings.setdefault("partial_rotary_factor", partial)
    spell.require_rope_type(facts, settings, allowed=rope_types)
    config.update(
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        max_position_embeddings=int(facts.size("max_position_embeddings", max_positions)),
        **spell.spell_rope(settings),
        **{eps[0]: facts.number(*eps)},
    )
