"""SigLIP: the text tower of an image-text pair, which is all of it that the runtime has."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount, Tensors
from arch_maps.text import siglip as text
from arch_maps.vision import siglip

_NO_PICTURES: Final = "the runtime embeds texts only; it has no picture tower for this type"


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    tower = root.at(source="text_model", target="text_model.text_model")
    text.tower(tower, facts.section("text_config").filled(text.DEFAULTS))
    why = "it scales the similarity of texts and pictures, and the runtime embeds texts only"
    root.drop("logit_scale", why)
    root.drop("logit_bias", why)
    _drop_pictures(root, facts.section("vision_config").filled(siglip.DEFAULTS))


def _drop_pictures(root: Mount, vision: Facts) -> None:
    tower, at = Mount(Tensors()), root / "vision_model"  # the tower's names relative to itself
    siglip.tower(tower, vision)
    for leaf in (leaf for rule in tower.out.rules for leaf in sources(rule.expr)):
        at.drop(leaf.name, _NO_PICTURES, *leaf.shape)
    at.drop("embeddings.position_ids", _NO_PICTURES)
    siglip.drop_pooling_head(at / "head", vision)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    out["text_config"] = text.spell_config(facts.section("text_config").filled(text.DEFAULTS))
    return out


MAP = ArchMap(
    model_type="siglip",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.siglip",),
    pipeline_tag="sentence-similarity",
    remarks=("mlx-vlm embeds texts only for this type; the picture tower is left out.",),
)
