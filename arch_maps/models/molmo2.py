"""Molmo 2: overlapping crops through a ViT, pooled by attention, and Qwen3's stack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import molmo2
from arch_maps.vision import molmo2_vit

_TOKENS: Final = {
    "image_start_token_id": 151936,
    "low_res_image_start_token_id": 151940,
    "image_end_token_id": 151937,
    "image_low_res_id": 151942,
    "image_patch_id": 151938,
    "image_col_id": 151939,
    "frame_start_token_id": 151943,
    "frame_end_token_id": 151944,
}
_RESAVED: Final = "as transformers 5 saves it"
"""It joins the two tables of the vocabulary and cuts them in the middle."""


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("tie_word_embeddings", False, default=False, why="the head has fewer rows")
    s, v = molmo2.sizes(facts.section("text_config")), molmo2_vit.views(facts)
    text = root.at(source="model.transformer", target="language_model.model")
    molmo2.stack(text, s, halved=layout.name == _RESAVED)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    pictures = root.at(source="model.vision_backbone", target="vision_tower", part="vision")
    molmo2_vit.tower(pictures / "image_vit", v)
    molmo2_vit.adapter(replace(pictures, part="projector"), v, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    s = molmo2.sizes(text)
    views = molmo2_vit.spell_config(molmo2_vit.views(facts), int(s.hidden))
    out["text_config"].update(molmo2.spell_config(text, s))
    out.update(views, vision_config=views, tie_word_embeddings=False)
    for name, default in _TOKENS.items():
        out[name] = int(facts.size(name, default))
    out["use_frame_special_tokens"] = facts.flag("use_frame_special_tokens", True)
    return out


MAP = ArchMap(
    model_type="molmo2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}), Layout(_RESAVED, {})),
    runtimes=("mlx-vlm",),
    parts=("text.molmo2", "vision.molmo2_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "transformers 5.23 cuts the joined vocabularies in the middle when it saves; that layout "
        "is read as well.",
    ),
)
