"""The Griffin text stack: gated linear recurrences, and windows of attention in between."""

from __future__ import annotations

from typing import Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount

_KINDS: Final = ("recurrent", "attention")


def block_kinds(facts: Facts) -> list[str]:
    """The kinds of layers, which repeat; 2B and 9B call the list differently."""
    listed = facts.data.get("block_types") or facts.data.get("_block_types")
    found = listed or ["recurrent", "recurrent", "attention"]
    if not isinstance(found, list) or not set(found) <= set(_KINDS) or "attention" not in found:
        facts.problem("config.json: block_types must list recurrent and attention blocks")
        return ["recurrent", "recurrent", "attention"]
    return found


def _recurrence(at: Mount, hidden: Dim, heads: Dim) -> None:
    """A gated convolution and a linear recurrence whose gates are block-diagonal."""
    for name in ("linear_x", "linear_y", "linear_out"):
        at.linear(name, hidden, hidden, bias=True)
    at.conv("conv_1d", hidden, 1, 4, bias=True)
    block = hidden // int(heads)
    for gate in ("input_gate", "recurrent_gate"):
        at.tensor(f"rg_lru.{gate}_weight", heads, block, block, kind=Kind.GATE)
        at.tensor(f"rg_lru.{gate}_bias", heads, block, kind=Kind.BIAS)
    at.tensor("rg_lru.recurrent_param", hidden, kind=Kind.STATE)


def _attention(at: Mount, hidden: Dim, heads: Dim) -> None:
    """Attention of all heads to one pair of keys and values."""
    at.linear("q_proj", hidden, hidden)
    at.linear("k_proj", hidden // int(heads), hidden)
    at.linear("v_proj", hidden // int(heads), hidden)
    at.linear("o_proj", hidden, hidden, bias=True)


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    heads, inner = facts.size("num_attention_heads"), facts.size("intermediate_size") // 2
    kinds = block_kinds(facts)
    model = root / "model"
    model.embedding("embed_tokens", vocab, hidden)
    for index, layer in model.layers("layers", facts.count("num_hidden_layers")):
        kind = kinds[index % len(kinds)]
        (_attention if kind == "attention" else _recurrence)(
            layer / "temporal_block", hidden, heads
        )
        for name in ("gate_proj", "up_proj"):
            layer.linear(f"mlp_block.{name}", inner, hidden, bias=True)
        layer.linear("mlp_block.down_proj", hidden, inner, bias=True)
        layer.norm("temporal_pre_norm", hidden)
        layer.norm("channel_pre_norm", hidden)
    model.norm("final_norm", hidden)
    tied = facts.flag("tie_word_embeddings", True)
    root.head("lm_head", vocab, hidden, tied_to="model.embed_tokens.weight" if tied else None)
