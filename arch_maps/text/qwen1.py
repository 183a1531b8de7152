"""The first Qwen's text stack: fused biased heads, and an MLP whose second half is the gate."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and a head of its own."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    inner = facts.size("intermediate_size") // 2
    width = facts.size("num_attention_heads") * facts.size("kv_channels", 128)
    biased = not facts.flag("no_bias", True)
    at = root / "transformer"
    at.embedding("wte", vocab, hidden)
    for _, layer in at.layers("h", facts.count("num_hidden_layers")):
        layer.linear("attn.c_attn", 3 * width, hidden, bias=True)
        layer.linear("attn.c_proj", hidden, width, bias=biased)
        layer.linear("mlp.w1", inner, hidden, bias=biased)
        layer.linear("mlp.w2", inner, hidden, bias=biased)
        layer.linear("mlp.c_proj", hidden, inner, bias=biased)
        layer.norm("ln_1", hidden)
        layer.norm("ln_2", hidden)
    at.norm("ln_f", hidden)
    at.drop("rotary_emb.inv_freq", "position frequencies follow from the config")
    root.linear("lm_head", vocab, hidden, bias=biased, kind=Kind.HEAD)
