"""InternVL 3.5 as transformers has it: an InternViT tower, pixel shuffle and Qwen3's stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import intern_vit


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts.section("text_config"), kv_heads=32, head_dim=128, qk_norm=True)


def _tied(facts: Facts) -> bool:
    # The reference ties by default but keeps a head that the release brings, as all of them do.
    return facts.flag("tie_word_embeddings", False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = facts.section("text_config")
    text.expect("attention_bias", False, default=False, why="the runtime has no such biases")
    text.expect("model_type", "qwen3", default="qwen2", why="the runtime computes no other stack")
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=_tied(facts))
    vision = facts.section("vision_config")
    intern_vit.tower(parts.vision(root, layout, "vision_tower"), vision)
    facts.expect("downsample_ratio", 0.5, default=0.5, why="this map is checked with a half")
    projector = parts.projector(root, layout)
    joined = vision.size("hidden_size", 1024) * 4
    projector.norm("layer_norm", joined, bias=True)
    parts.two_layers(projector, joined, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    text.expect("use_sliding_window", False, default=False, why="the runtime attends to everything")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("vision_feature_layer", -1, default=-1, why="the runtime takes the last layer")
    facts.expect(
        "vision_feature_select_strategy",
        "default",
        default="default",
        why="the runtime leaves out the class token",
    )
    s = _sizes(facts)
    llama.spell_config(out["text_config"], text, s, max_positions=32768)
    out["text_config"].update(model_type="qwen3", tie_word_embeddings=_tied(facts))
    intern_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    # The runtime cuts tiles by the config, not by the release's preprocessor settings.
    out.setdefault("min_dynamic_patch", 1)
    out.setdefault("max_dynamic_patch", 12)
    out.setdefault("use_thumbnail", True)
    out.update(
        tie_word_embeddings=_tied(facts),
        downsample_ratio=0.5,
        image_token_id=int(facts.size("image_token_id", 151667)),
    )
    return out


MAP = ArchMap(
    model_type="internvl",
    tensors=_tensors,
    config=_config,
    layouts=parts.PIXTRAL_LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.intern_vit", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
