"""The EXAONE 3 text stack: Llama's layers under GPT-2's names."""

from __future__ import annotations

from arch_maps.rules import Mount
from arch_maps.text.llama import Sizes


def causal_lm(root: Mount, s: Sizes) -> None:
    """Table, layers, final norm and head."""
    at = root / "transformer"
    at.embedding("wte", s.vocab, s.hidden)
    for _, layer in at.layers("h", s.layers):
        attention = layer / "attn.attention"
        attention.linear("q_proj", s.heads * s.head_dim, s.hidden)
        attention.linear("k_proj", s.kv_heads * s.head_dim, s.hidden)
        attention.linear("v_proj", s.kv_heads * s.head_dim, s.hidden)
        attention.linear("out_proj", s.hidden, s.heads * s.head_dim)
        for name in ("c_fc_0", "c_fc_1"):
            layer.linear(f"mlp.{name}", s.intermediate, s.hidden)
        layer.linear("mlp.c_proj", s.hidden, s.intermediate)
        layer.norm("ln_1", s.hidden)
        layer.norm("ln_2", s.hidden)
        layer.drop("attn.attention.rotary.inv_freq", "position frequencies follow from the config")
    at.norm("ln_f", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="transformer.wte.weight" if s.tied else None)
