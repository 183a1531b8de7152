"""PLaMo 13B: attention and MLP side by side after one norm, keys shared by eight heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts)
    shared = int(facts.size("n_shared_head", 8))
    if int(found.heads) % shared:
        facts.problem("config.json: n_shared_head must divide num_attention_heads")
    groups = Dim(-(-int(found.heads) // shared), "num_attention_heads/n_shared_head")
    return replace(found, kv_heads=groups, attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for _index, layer in (model / "layers").layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        layer.norm("norm", s.hidden)
        layer.drop("self_attn.rotary_emb.inv_freq", "position frequencies follow from the config")
    model.norm("norm", s.hidden)
    root.linear("lm_head", s.vocab, s.hidden, kind=Kind.HEAD)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes have a head of its own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    llama.expect_silu(facts)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out = spell.start(config)
    out.update(
        n_shared_head=int(facts.size("n_shared_head", 8)),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        rope_traditional=False,
        tie_word_embeddings=False,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="plamo",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
