"""dots.ocr and dots.mocr: a tower of their own and the Qwen2 text stack, written flat."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import dots_vit


def _sizes(text: Facts) -> llama.Sizes:
    biased = text.flag("attention_bias", True)
    return replace(llama.sizes(text), attention_bias=False, qkv_bias=biased)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts.nested("text_config"))
    stack = root.at(source="model", target="language_model.model")
    llama.stack(stack, s)
    head = root.at(source="", target="language_model.model")
    if s.tied:  # the runtime keeps a head of its own
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source="vision_tower", target="vision_tower", part="vision")
    dots_vit.tower(tower, facts.section("vision_config"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.nested("text_config")
    s = _sizes(text)
    text.expect("use_sliding_window", False, default=False, why="the runtime has no window")
    section = copy.deepcopy(dict(text.data))
    for name in ("vision_config", "auto_map", "architectures"):
        section.pop(name, None)
    llama.spell_config(
        section, text, s, max_positions=32768, theta=10000.0, rope_types=("default", "linear")
    )
    section.update(
        model_type="dots_ocr",
        attention_bias=s.qkv_bias,
        vocab_size=int(s.vocab),
        rope_traditional=False,
    )
    dots_vit.spell_config(out["vision_config"], facts.section("vision_config"), int(s.hidden))
    out.setdefault("image_token_id", 151665)
    out.setdefault("video_token_id", 151656)
    out.update(text_config=section, vocab_size=int(s.vocab), tie_word_embeddings=s.tied)
    return out


MAP = ArchMap(
    model_type="dots_ocr",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.dots_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
