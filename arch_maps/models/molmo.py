"""Molmo (7B-D, 72B): a CLIP tower pooled by attention, and Qwen2's stack with fused projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import molmo_vit

_ADDED = 128
"""Rows of the second table, which the release's own code adds for pictures' marks."""
_ONLY: Final[tuple[tuple[str, Any, str], ...]] = (
    ("attention_layer_norm", False, "the runtime does not norm queries and keys"),
    ("clip_qkv", None, "the runtime does not clip"),
    ("layer_norm_type", "rms", "the runtime has RMS norms"),
    ("norm_after", False, "the runtime norms before each block"),
    ("qkv_bias", True, "the runtime has these biases"),
    ("weight_tying", False, "the runtime multiplies by half of a tied table"),
)


def _inner(s: llama.Sizes, facts: Facts) -> Dim:
    if int(s.intermediate) % 2:
        facts.problem("config.json: intermediate_size counts gates and ups, so it must be even")
    return s.intermediate // 2


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = llama.sizes(facts), molmo_vit.facts_of(facts)
    inner = _inner(s, facts)
    text = root.at(source="model.transformer", target="language_model.model")
    rows = facts.size("embedding_size", int(s.vocab))
    text.tensor("wte.embedding", rows, s.hidden, kind=Kind.EMBEDDING)
    text.tensor("wte.new_embedding", _ADDED, s.hidden, kind=Kind.EMBEDDING)
    for _index, block in text.layers("blocks", s.layers):
        fused = (s.heads + 2 * s.kv_heads) * s.head_dim
        block.linear("att_proj", fused, s.hidden, bias=True)
        block.linear("attn_out", s.hidden, s.heads * s.head_dim)
        block.linear("ff_proj", s.intermediate, s.hidden)
        block.linear("ff_out", s.hidden, inner)
        block.norm("attn_norm", s.hidden)
        block.norm("ff_norm", s.hidden)
    text.norm("ln_f", s.hidden)
    text.linear("ff_out", rows, s.hidden, kind=Kind.HEAD)
    pictures = root.at(source="model.vision_backbone", target="vision_tower", part="vision")
    molmo_vit.tower(pictures / "image_vit", vision)
    molmo_vit.adapter(replace(pictures, part="projector"), vision, inner, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), llama.sizes(facts)
    for name, value, why in _ONLY:
        facts.expect(name, value, default=value, why=why)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = spell.rope(facts, default_theta=1e6)
    spell.require_rope_type(facts, rope, allowed=("default",))
    rows = int(facts.size("embedding_size", int(s.vocab)))
    out["text_config"] = {
        "model_type": "molmo",
        "d_model": int(s.hidden),
        "n_heads": int(s.heads),
        "n_kv_heads": int(s.kv_heads),
        "n_layers": s.layers,
        "mlp_hidden_size": int(s.intermediate),
        "act_output_multiplier": 0.5,
        "vocab_size": rows,
        "embedding_size": rows,
        "additional_vocab_size": _ADDED,
        "layer_norm_eps": facts.number("layer_norm_eps", 1e-5),
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": int(facts.size("max_position_embeddings", 2048)),
        "weight_tying": False,
    }
    out["vision_config"] = molmo_vit.spell_config(
        molmo_vit.facts_of(facts), _inner(s, facts), int(s.hidden)
    )
    out.update(rope_theta=rope["rope_theta"], tie_word_embeddings=False)
    return out


MAP = ArchMap(
    model_type="molmo",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.molmo_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
