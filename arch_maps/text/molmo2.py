"""Molmo 2's text stack: Qwen3's layers with fused projections, and a second small vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.ops import Concat, Slice
from arch_maps.rules import Kind, Mount


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    added: Dim
    hidden: Dim
    intermediate: Dim
    layers: int
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    qkv_bias: bool


def sizes(facts: Facts) -> Sizes:
    """Read the sizes, with the reference's defaults."""
    bias = facts.flag("attention_bias", False) or facts.flag("qkv_bias", False)
    return Sizes(
        vocab=facts.size("vocab_size", 151936),
        added=facts.size("additional_vocab_size", 128),
        hidden=facts.size("hidden_size", 4096),
        intermediate=facts.size("intermediate_size", 12288),
        layers=facts.count("num_hidden_layers", 36),
        heads=facts.size("num_attention_heads", 32),
        kv_heads=facts.size("num_key_value_heads", 8),
        head_dim=facts.size("head_dim", 128),
        qkv_bias=bias,
    )


def stack(at: Mount, s: Sizes, *, halved: bool) -> None:
    """Both vocabularies, blocks with fused projections, and the last norm.

    ``halved``: the two tables were joined and cut in the middle, wherever their border lay.
    """
    if halved:
        total = int(s.vocab) + int(s.added)
        first = -(-total // 2)
        table = Concat(
            (
                at.input("wte.embedding", first, s.hidden),
                at.input("wte.new_embedding", total - first, s.hidden),
            )
        )
        at.rule("wte.embedding", Slice(table, 0, 0, int(s.vocab)), Kind.EMBEDDING)
        at.rule("wte.new_embedding", Slice(table, 0, int(s.vocab), total), Kind.EMBEDDING)
    else:
        at.tensor("wte.embedding", s.vocab, s.hidden, kind=Kind.EMBEDDING)
        at.tensor("wte.new_embedding", s.added, s.hidden, kind=Kind.EMBEDDING)
    rows = (s.heads + 2 * s.kv_heads) * s.head_dim
    for _, block in at.layers("blocks", s.layers):
        attention = block / "self_attn"
        attention.linear("att_proj", rows, s.hidden, bias=s.qkv_bias)
        attention.linear("attn_out", s.hidden, s.heads * s.head_dim)
        attention.norm("q_norm", s.head_dim)
        attention.norm("k_norm", s.head_dim)
        block.linear("mlp.ff_proj", 2 * s.intermediate, s.hidden)
        block.linear("mlp.ff_out", s.hidden, s.intermediate)
        block.norm("attn_norm", s.hidden)
        block.norm("ff_norm", s.hidden)
    at.norm("ln_f", s.hidden)


def spell_config(facts: Facts, s: Sizes) -> dict[str, Any]:
    """The stack's facts under the names that the runtime reads."""
    facts.expect("hidden_act", "silu", default="silu", why="the runtime computes SiLU")
    facts.expect("qk_norm_type", "qwen3", default="qwen3", why="the runtime norms single heads")
    facts.expect("use_qk_norm", True, default=True, why="the runtime has these norms")
    facts.expect("norm_after", False, default=False, why="the runtime norms before each block")
    settings = spell.rope(facts)
    spell.require_rope_type(facts, settings)
    if settings["rope_type"] != "default" and facts.data.get("rope_scaling_layers") not in (
        None,
        list(range(s.layers)),
    ):
        facts.problem("config.json: rope_scaling_layers: the runtime scales every layer or none")
    eps = facts.number("rms_norm_eps", facts.number("layer_norm_eps", 1e-6))
    return {
        "model_type": "molmo2_text",
        "vocab_size": int(s.vocab),
        "additional_vocab_size": int(s.added),
        "hidden_size": int(s.hidden),
        "intermediate_size": int(s.intermediate),
        "num_hidden_layers": s.layers,
        "num_attention_heads": int(s.heads),
        "num_key_value_heads": int(s.kv_heads),
        "head_dim": int(s.head_dim),
        "hidden_act": "silu",
        "layer_norm_eps": eps,
        "rms_norm_eps": eps,
        "max_position_embeddings": int(facts.size("max_position_embeddings", 36864)),
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "norm_after": False,
        "qkv_bias": s.qkv_bias,
        "attention_bias": s.qkv_bias,
        "embedding_dropout": 0.0,
        "tie_word_embeddings": False,
        **spell.spell_rope(settings),
    }
