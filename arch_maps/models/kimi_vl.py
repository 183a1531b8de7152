"""Kimi-VL: the MoonViT tower over DeepSeek V3's stack, whose keys and values stay one tensor."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.models import deepseek_v3
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, moe
from arch_maps.vision import moonvit


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text, vision = facts.section("text_config"), facts.section("vision_config")
    sparse = moe.dense_prefix(text, text.count("num_hidden_layers"))
    deepseek.latent_lm(root / "language_model", text, sparse, fused=False, absorbed=False)
    tower = root.at(source="vision_tower", target="vision_tower", part="vision")
    moonvit.tower(tower, vision, inner="encoder", patches="")
    name = "multi_modal_projector"
    projector = root.at(source=name, target=name, part="projector")
    joined = moonvit.joined(vision)
    projector.norm("pre_norm", moonvit.facts_of(vision).size("hidden_size"), bias=True)
    projector.linear("linear_1", joined, joined, bias=True)
    projector.linear("linear_2", text.size("hidden_size"), joined, bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    text.expect("model_type", "deepseek_v3", default="deepseek_v3", why="the runtime has no other")
    out["text_config"] = deepseek_v3.MAP.config(dict(text.data), text)
    moonvit.spell_config(out["vision_config"], vision)
    image = int(facts.size("media_placeholder_token_id", 163605))
    out.update(
        media_placeholder_token_id=image,
        image_token_index=image,
        vocab_size=int(text.size("vocab_size")),
    )
    return out


MAP = ArchMap(
    model_type="kimi_vl",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "text.mla", "text.moe", "vision.moonvit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-lm 0.32.2 has a module of this name that cannot load the type's keys and values.",
    ),
)
