"""Cohere Compass (North Micro Vision): the Qwen vision tower at several depths, Cohere's stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import compass, llama
from arch_maps.vision import qwen_vit


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = compass.sizes(facts.section("text_config"))
    llama.stack(root.at(source=layout["text"], target="language_model.model"), s)
    table = f"{layout['text']}.embed_tokens.weight"
    head = root.at(source="", target="language_model")
    tied = table if facts.flag("tie_word_embeddings", False) else None
    head.head("lm_head", s.vocab, s.hidden, tied_to=tied)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    qwen_vit.tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    tied = facts.flag("tie_word_embeddings", False)
    out["text_config"] = compass.spell_config(text, compass.sizes(text), tied=tied)
    rope = vision.data.get("rope_parameters") or {}
    if rope.get("rope_theta", 10000.0) != 10000:
        facts.problem("config.json: vision_config.rope_theta: the runtime rotates by 10000")
    qwen_vit.spell_config(
        out["vision_config"], vision, model_type="cohere_compass_vision", deepstack=True
    )
    out["vision_config"]["use_rope"] = True
    out.update(
        tie_word_embeddings=tied,
        image_token_id=int(facts.size("image_token_id", 255031)),
        vision_start_token_id=int(facts.size("vision_start_token_id", 255028)),
        vision_end_token_id=int(facts.size("vision_end_token_id", 255029)),
    )
    return out


MAP = ArchMap(
    model_type="cohere_compass",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "model.language_model", "vision": "model.visual"}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.compass", "vision.qwen_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
