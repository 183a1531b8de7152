"""Multi-head latent attention: keys and values made from one small latent per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Concat, Expr, Permute, Reshape, Slice
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the attention's shapes depend on; ``q_rank`` is None where queries are made directly."""

    hidden: Dim
    heads: Dim
    q_rank: Dim | None
    kv_rank: Dim
    nope: Dim
    rope: Dim
    value: Dim
    bias: bool = False


def sizes(facts: Facts, *, rotated: bool = True) -> Sizes:
    """Read the sizes; releases state them all. ``rotated`` is whether a part of a head rotates."""
    return Sizes(
        hidden=facts.size("hidden_size"),
        heads=facts.size("num_attention_heads"),
        q_rank=None if facts.data.get("q_lora_rank") is None else facts.size("q_lora_rank"),
        kv_rank=facts.size("kv_lora_rank"),
        nope=facts.size("qk_nope_head_dim"),
        rope=facts.size("qk_rope_head_dim") if rotated else Dim(0, "qk_rope_head_dim"),
        value=facts.size("v_head_dim"),
        bias=facts.flag("attention_bias", False),
    )


def attention(at: Mount, s: Sizes, *, absorbed: bool = True, halves: bool = False) -> None:
    """The projections; ``absorbed`` where the runtime holds ``kv_b_proj`` as two per-head ones.

    ``halves`` where the release rotates the halves of a head together, and the runtime neighbours.
    """
    at.changed_values("values are made from a latent vector, which is what the cache holds")
    if halves:
        _paired(at, s)
        return
    queries = s.heads * (s.nope + s.rope)
    if s.q_rank is None:
        at.linear("q_proj", queries, s.hidden)
    else:
        at.linear("q_a_proj", s.q_rank, s.hidden, bias=s.bias)
        at.norm("q_a_layernorm", s.q_rank)
        at.linear("q_b_proj", queries, s.q_rank)
    at.linear("kv_a_proj_with_mqa", s.kv_rank + s.rope, s.hidden, bias=s.bias)
    at.norm("kv_a_layernorm", s.kv_rank)
    if absorbed:
        per_head(at, s)
    else:
        at.linear("kv_b_proj", s.heads * (s.nope + s.value), s.kv_rank)
    at.linear("o_proj", s.hidden, s.heads * s.value, bias=s.bias)


def joined_attention(at: Mount, s: Sizes) -> None:
    """The absorbed projections where the runtime makes both latents by one, ``qkv_a_proj``."""
    at.changed_values("values are made from a latent vector, which is what the cache holds")
    assert s.q_rank is not None
    ranks = {"q_a_proj": s.q_rank, "kv_a_proj_with_mqa": s.kv_rank + s.rope}
    llama.joined(at, "qkv_a_proj", ranks, s.hidden, bias=s.bias)
    at.norm("q_a_layernorm", s.q_rank)
    at.linear("q_b_proj", s.heads * (s.nope + s.rope), s.q_rank)
    at.norm("kv_a_layernorm", s.kv_rank)
    per_head(at, s)
    at.linear("o_proj", s.hidden, s.heads * s.value, bias=s.bias)


def neighbours(x: Expr, blocks: int) -> Expr:
    """Rows of ``blocks`` blocks, the first half of each taking turns with its second half."""
    size, rest = x.shape[0] // blocks, x.shape[1:]
    halves = Reshape(x, (blocks, 2, size // 2, *rest))
    axes = (0, 2, 1, *range(3, 3 + len(rest)))
    return Reshape(Permute(halves, axes), x.shape)


def _paired(at: Mount, s: Sizes) -> None:
    nope, rope, kv = int(s.nope), int(s.rope), int(s.kv_rank)
    assert s.q_rank is not None
    at.linear("q_a_proj", s.q_rank, s.hidden)
    at.norm("q_a_layernorm", s.q_rank)
    queries = at.input("q_b_proj.weight", s.heads * (s.nope + s.rope), s.q_rank)
    heads = Reshape(queries, (s.heads, nope + rope, s.q_rank))
    turned = Reshape(Slice(heads, 1, nope, nope + rope), (s.heads * rope, s.q_rank))
    turned = Reshape(neighbours(turned, s.heads), (s.heads, rope, s.q_rank))
    both = Concat((Slice(heads, 1, 0, nope), turned), 1)
    at.rule("q_b_proj.weight", Reshape(both, queries.shape), Kind.LINEAR)
    latent = at.input("kv_a_proj_with_mqa.weight", s.kv_rank + s.rope, s.hidden)
    keys = neighbours(Slice(latent, 0, kv, kv + rope), 1)
    at.rule("kv_a_proj_with_mqa.weight", Concat((Slice(latent, 0, 0, kv), keys)), Kind.LINEAR)
    at.norm("kv_a_layernorm", s.kv_rank)
    per_head(at, s)
    at.linear("o_proj", s.hidden, s.heads * s.value)


def per_head(at: Mount, s: Sizes) -> None:
    """``kv_b_proj`` [heads * (nope + value), rank] as its key half, transposed, and its value half.

    ``embed_q`` is [heads, rank, nope] and ``unembed_out`` [heads, value, rank].
    """
    both = at.input("kv_b_proj.weight", s.heads * (s.nope + s.value), s.kv_rank)
    heads = Reshape(both, (s.heads, s.nope + s.value, s.kv_rank))
    nope, end = int(s.nope), int(s.nope) + int(s.value)
    at.rule("embed_q.weight", Permute(Slice(heads, 1, 0, nope), (0, 2, 1)), Kind.LINEAR)
    at.rule("unembed_out.weight", Slice(heads, 1, nope, end), Kind.LINEAR)


def spell_config(config: dict[str, Any], s: Sizes) -> None:
    """Write the attention's sizes as the runtimes read them, in place."""
    config.update(
        q_lora_rank=None if s.q_rank is None else int(s.q_rank),
        kv_lora_rank=int(s.kv_rank),
        qk_nope_head_dim=int(s.nope),
        qk_rope_head_dim=int(s.rope),
        v_head_dim=int(s.value),
        attention_bias=s.bias,
    )
