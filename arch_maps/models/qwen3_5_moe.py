"""Qwen3.5 mixtures of experts with vision."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import qwen3_5, qwen3_5_moe
from arch_maps.vision import qwen_vit

_PLACES = {"text": "model.language_model", "vision": "model.visual"}


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    s = qwen3_5_moe.sizes(text)
    experts = qwen3_5_moe.feed_forward(text, fused=layout.fused_experts)
    qwen3_5.stack(root.at(source=layout["text"], target="language_model.model"), s, experts)
    tied = f"{layout['text']}.embed_tokens.weight" if qwen3_5.tied(facts) else None
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=tied)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    qwen_vit.tower(tower, facts.section("vision_config"))
    qwen3_5_moe.drop_mtp(root, text, s)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    tied = qwen3_5.tied(facts)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    qwen3_5_moe.spell_config(out["text_config"], text, tied=tied)
    out["text_config"]["model_type"] = "qwen3_5_moe_text"
    qwen_vit.spell_config(out["vision_config"], vision, model_type="qwen3_5_moe")
    out.update(
        tie_word_embeddings=tied,
        vocab_size=int(text.size("vocab_size")),
        **qwen3_5.media_tokens(facts),
    )
    return out


MAP = ArchMap(
    model_type="qwen3_5_moe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("fused experts", _PLACES, fused_experts=True),
        Layout("a tensor per expert", _PLACES),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.qwen3_5_moe", "text.moe", "vision.qwen_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
