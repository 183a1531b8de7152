"""Youtu-LLM: latent attention in a dense stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, mla


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    m, hidden, vocab = mla.sizes(facts), facts.size("hidden_size"), facts.size("vocab_size")
    inner, bias = facts.size("intermediate_size"), facts.flag("mlp_bias", False)
    model = root / "model"
    model.embedding("embed_tokens", vocab, hidden)
    for _index, layer in model.layers("layers", facts.count("num_hidden_layers")):
        mla.attention(layer / "self_attn", m, absorbed=False)
        llama.gated_mlp(layer / "mlp", hidden, inner, bias=bias)
        layer.norm("input_layernorm", hidden)
        layer.norm("post_attention_layernorm", hidden)
    model.norm("norm", hidden)
    tied = facts.flag("tie_word_embeddings", True)
    root.head("lm_head", vocab, hidden, tied_to="model.embed_tokens.weight" if tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    why = "the runtimes rotate neighbouring pairs here"
    facts.expect("rope_interleave", True, default=True, why=why)
    heads = int(facts.size("num_attention_heads"))
    facts.expect("num_key_value_heads", heads, None, default=heads, why="every head has its keys")
    why = "the reference's latent norms have that one whatever it says, the runtimes this one"
    facts.expect("rms_norm_eps", 1e-6, default=1e-6, why=why)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out = spell.start(config)
    mla.spell_config(out, mla.sizes(facts))
    out.update(
        model_type="youtu_llm",
        num_key_value_heads=heads,
        mlp_bias=facts.flag("mlp_bias", False),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        tie_word_embeddings=facts.flag("tie_word_embeddings", True),
        rope_interleave=True,
        rope_traditional=True,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="youtu_llm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.mla", "text.llama"),
)
