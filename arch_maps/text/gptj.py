"""The GPT-J text stack: attention and a plain MLP side by side after one biased norm."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_BUFFER = "a buffer that the runtime computes itself"


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and a biased head."""
    hidden, vocab = facts.size("n_embd"), facts.size("vocab_size")
    inner = 4 * hidden
    model = root.at(source="transformer", target="model")
    model.embedding("wte", vocab, hidden)
    for _index, layer in model.layers("h", facts.count("n_layer")):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer.linear(f"attn.{name}", hidden, hidden)
        layer.linear("mlp.fc_in", inner, hidden, bias=True)
        layer.linear("mlp.fc_out", hidden, inner, bias=True)
        layer.norm("ln_1", hidden, bias=True)
        for name in ("attn.bias", "attn.masked_bias"):
            layer.drop(name, _BUFFER)
    model.norm("ln_f", hidden, bias=True)
    root.linear("lm_head", vocab, hidden, bias=True, kind=Kind.HEAD)
