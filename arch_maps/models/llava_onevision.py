"""LLaVA-OneVision: a SigLIP tower over picture tiles, a two-layer projector and Qwen2's stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import siglip


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts.section("text_config"), kv_heads=32, qkv_bias=True)


def _tied(facts: Facts) -> bool:
    inner = facts.section("text_config").flag("tie_word_embeddings", False)
    return facts.flag("tie_word_embeddings", False) or inner


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=_tied(facts))
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    siglip.tower(parts.vision(root, layout), vision)
    parts.two_layers(parts.projector(root, layout), vision.size("hidden_size"), s.hidden)
    newline = root.at(source=layout["root"], target="", part="projector")
    newline.tensor("image_newline", s.hidden, kind=Kind.POSITION)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    text.expect("model_type", "qwen2", default="qwen2", why="the runtime computes no other stack")
    text.expect("use_sliding_window", False, default=False, why="the runtime attends to everything")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("multimodal_projector_bias", True, default=True, why="the runtime has biases")
    vision.expect("vision_use_head", False, default=None, why="this map has no pooling head")
    s = _sizes(facts)
    section = out["text_config"]
    llama.spell_config(section, text, s, max_positions=32768)
    if section["rope_parameters"]["rope_type"] != "default":
        facts.problem("config.json: the runtime computes unscaled positions only")
    section.update(model_type="qwen2", tie_word_embeddings=_tied(facts), rope_traditional=False)
    siglip.spell_config(out["vision_config"], vision)
    out["vision_config"]["vision_use_head"] = False
    out.update(
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=int(facts.size("image_token_index", 151646)),
        video_token_index=int(facts.size("video_token_index", 151647)),
        vision_aspect_ratio=facts.data.get("vision_aspect_ratio", "anyres_max_9"),
        vision_feature_layer=facts.data.get("vision_feature_layer", -1),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "full"),
        use_image_newline_parameter=True,
    )
    return out


MAP = ArchMap(
    model_type="llava_onevision",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
