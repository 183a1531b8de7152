"""Qwen3-VL: Qwen3's text stack, fed by the Qwen vision tower at several depths."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, qwen_vl
from arch_maps.vision import qwen_vit


def _sizes(text: Facts) -> llama.Sizes:
    return llama.sizes(text, kv_heads=32, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    text.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(text)
    llama.stack(root.at(source=layout["text"], target="language_model.model"), s)
    tied = f"{layout['text']}.embed_tokens.weight" if qwen_vl.tied(facts) else None
    head = root.at(source="", target="language_model")
    head.head("lm_head", s.vocab, s.hidden, tied_to=tied)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    qwen_vit.tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    spelled = qwen_vl.spell_config(
        text,
        _sizes(text),
        theta=5e5,
        eps=1e-6,
        max_positions=128000,
        is_tied=qwen_vl.tied(facts),
        section=(24, 20, 20),
    )
    out["text_config"].update(spelled, model_type="qwen3_vl_text", attention_bias=False)
    out.update(tie_word_embeddings=qwen_vl.tied(facts), vocab_size=int(text.size("vocab_size")))
    qwen_vl.spell_tokens(out)
    qwen_vit.spell_config(
        out["vision_config"],
        facts.section("vision_config"),
        model_type="qwen3_vl",
        deepstack=True,
    )
    return out


MAP = ArchMap(
    model_type="qwen3_vl",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {"text": "model.language_model", "vision": "model.visual"}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.qwen_vl", "vision.qwen_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
