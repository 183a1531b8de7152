"""The GPT-NeoX text stack: fused heads, biased layer norms, a head of its own."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

_BUFFER = "a buffer that the runtimes compute themselves"


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head, which the runtimes hold under ``model`` together."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    inner = facts.size("intermediate_size")
    if int(inner) != 4 * int(hidden):
        facts.problem("config.json: intermediate_size must be 4 * hidden_size here")
    why = "the runtimes have a head of its own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    facts.expect("attention_bias", True, default=True, why="the runtimes have these biases")
    at = root.at(source="gpt_neox", target="model")
    at.embedding("embed_in", vocab, hidden)
    for index in range(facts.count("num_hidden_layers")):
        layer = at.at(source=f"layers.{index}", target=f"h.{index}")
        layer.linear("attention.query_key_value", 3 * hidden, hidden, bias=True)
        layer.linear("attention.dense", hidden, hidden, bias=True)
        layer.linear("mlp.dense_h_to_4h", inner, hidden, bias=True)
        layer.linear("mlp.dense_4h_to_h", hidden, inner, bias=True)
        layer.norm("input_layernorm", hidden, bias=True)
        layer.norm("post_attention_layernorm", hidden, bias=True)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
            layer.drop(f"attention.{name}", _BUFFER)
    at.norm("final_layer_norm", hidden, bias=True)
    root.at(source="", target="model").linear("embed_out", vocab, hidden, kind=Kind.HEAD)
