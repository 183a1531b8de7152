"""Jina VLM: SigLIP's blocks with fused projections, attention pooling, and Qwen3's stack fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import jina_vit


def _sizes(facts: Facts) -> llama.Sizes:
    """Llama's sizes under the release's own nested names."""
    text = facts.section("text_config")
    block = text.section("block_config")
    heads = block.section("attn_config")
    named = {
        "vocab_size": text.size("vocab_size"),
        "hidden_size": text.size("hidden_size"),
        "num_hidden_layers": text.size("n_layers"),
        "intermediate_size": block.section("ffn_config").size("size"),
        "num_attention_heads": heads.size("n_heads"),
        "num_key_value_heads": heads.size("n_kv_heads"),
        "head_dim": heads.size("head_dim"),
    }
    return llama.sizes(Facts(named, path="text_config.", parent=facts), qk_norm=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, text = _sizes(facts), facts.section("text_config")
    text.expect("tie_word_embeddings", False, default=False, why="the head has fewer rows")
    body = root / "language_model"
    body.tensor("embedding.embedding", s.vocab, s.hidden, kind=Kind.EMBEDDING)
    added = text.size("additional_vocab_size", 128)
    body.tensor("embedding.new_embedding", added, s.hidden, kind=Kind.EMBEDDING)
    for _index, layer in body.layers("layers", s.layers):
        layer.norm("attn_norm", s.hidden)
        layer.linear("attn.qkv", (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
        layer.linear("attn.out", s.hidden, s.heads * s.head_dim)
        layer.norm("attn.q_norm", s.head_dim)
        layer.norm("attn.k_norm", s.head_dim)
        layer.norm("ffn_norm", s.hidden)
        layer.linear("ffn.gate_up", 2 * s.intermediate, s.hidden)
        layer.linear("ffn.down", s.hidden, s.intermediate)
    body.norm("ln_f", s.hidden)
    head = root.at(source="", target="language_model")
    head.linear("lm_head", s.vocab, s.hidden, kind=Kind.HEAD)
    vision = facts.section("vision_config")
    tower = root.at(source="vision_model", target="vision_model", part="vision")
    jina_vit.tower(tower, vision)
    jina_vit.connector(replace(root / "vl_connector", part="projector"), vision, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    heads = facts.section("text_config").section("block_config").section("attn_config")
    heads.expect("q_lnorm", True, default=True, why="this map is checked with these norms")
    jina_vit.spell_config(out["vision_config"], facts.section("vision_config"), int(s.hidden))
    text = facts.section("text_config")
    out["text_config"].update(  # read once more, flat, after the release's own names
        model_type="jina_vlm",
        hidden_size=int(s.hidden),
        num_hidden_layers=s.layers,
        num_attention_heads=int(s.heads),
        num_key_value_heads=int(s.kv_heads),
        head_dim=int(s.head_dim),
        intermediate_size=int(s.intermediate),
        additional_vocab_size=int(text.size("additional_vocab_size", 128)),
        rms_norm_eps=text.section("block_config").nested("lnorm_config").number("eps", 1e-6),
        rope_theta=text.number("rope_theta", 1e6),
        use_qk_norm=True,
        tie_word_embeddings=False,
    )
    out.update(vocab_size=int(s.vocab), tie_word_embeddings=False)
    return out


MAP = ArchMap(
    model_type="jvlm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.jina_vit"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "Pictures are not judged: mlx-vlm 0.7.10 prepares them with the released tower's size and "
        "the ids of the release's marks in its code.",
    ),
)
