"""The RWKV-7 text stack: a recurrence whose decay, gate and mixing come from low-rank pairs."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.ops import Reshape
from arch_maps.rules import Kind, Mount

RANKS = {
    "w_lora": "decay_low_rank_dim",
    "v_lora": "v_low_rank_dim",
    "a_lora": "a_low_rank_dim",
    "g_lora": "gate_low_rank_dim",
}


def _time_mixing(at: Mount, facts: Facts, *, first: bool) -> None:
    hidden, head_dim = facts.size("hidden_size"), facts.size("head_dim", 64)
    heads, by_head = hidden // int(head_dim), (int(hidden) // int(head_dim), int(head_dim))
    if int(hidden) % int(head_dim):
        facts.problem("config.json: head_dim must divide hidden_size")
        by_head = (1, int(hidden))
    for name in ("r", "w", "k", "v", "a", "g"):
        at.tensor(f"x_{name}", 1, 1, hidden, kind=Kind.STATE)
    for name in ("k_k", "k_a"):
        at.rule(name, Reshape(at.input(name, hidden), by_head), Kind.STATE)
    at.tensor("r_k", heads, head_dim, kind=Kind.STATE)
    for name in ("r_proj", "k_proj", "v_proj", "o_proj"):
        at.linear(name, hidden, hidden)
    for leaf, kind in (("weight", Kind.NORM), ("bias", Kind.BIAS)):
        at.rule(f"g_norm.{leaf}", Reshape(at.input(f"g_norm.{leaf}", hidden), by_head), kind)
    for name, rank in RANKS.items():
        if first and name == "v_lora":
            continue
        pair = at / f"{name}.lora"
        pair.linear("0", facts.size(rank), hidden, kind=Kind.GATE)
        pair.linear("2", hidden, facts.size(rank), bias=name != "g_lora", kind=Kind.GATE)


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    inner = facts.size("intermediate_size")
    model = root / "model"
    model.embedding("embeddings", vocab, hidden)
    for index, layer in model.layers("layers", facts.count("num_hidden_layers")):
        norms = ("attn_norm", "ffn_norm") if index else ("pre_norm", "attn_norm", "ffn_norm")
        for name in norms:
            layer.norm(name, hidden, bias=True)
        _time_mixing(layer / "attn", facts, first=index == 0)
        layer.linear("ffn.key", inner, hidden)
        layer.linear("ffn.value", hidden, inner)
        layer.tensor("ffn.x_k", hidden, kind=Kind.STATE)
    model.norm("norm", hidden, bias=True)
    tied = facts.flag("tie_word_embeddings", False)
    root.head("lm_head", vocab, hidden, tied_to="model.embeddings.weight" if tied else None)
