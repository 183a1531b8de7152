"""DeepSeek-VL2 (tiny): SigLIP with its unused head, and DeepSeek V2's experts."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.projectors import deepseek_ocr
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.vision import timm_siglip

_PROJECTOR: Final[dict[str, Any]] = {
    "projector_type": "downsample_mlp_gelu",
    "n_embed": 2048,
    "depth": 2,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
    "token_pooling": False,
}
"""The reference's defaults."""


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    deepseek_ocr.text(root, facts, source="language")
    vision = facts.section("vision_config")
    tower = root.at(source="vision", target="vision.vision_tower", part="vision")
    timm_siglip.tower(tower, vision)
    given = facts.section("projector_config").filled(_PROJECTOR)
    size = given.size("n_embed")
    wide = given.size("downsample_ratio") ** 2 * timm_siglip.width(vision)
    at = root.at(source="", target="", part="projector")
    at.linear("projector.layers.0", size, wide, bias=True)
    at.linear("projector.layers.2", size, size, bias=True)
    # The releases misspell it, the runtime does not.
    at.rule("view_separator", at.input("view_seperator", size), Kind.POSITION)
    at.tensor("image_newline", size, kind=Kind.POSITION)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = deepseek_ocr.spell_text(config, facts, model_type="deepseek_vl_v2")
    vision = facts.section("vision_config")
    timm_siglip.spell_config(out["vision_config"], vision)
    given = facts.section("projector_config")
    why = "the map has two dense layers over four patches only"
    for name in ("projector_type", "depth", "mlp_ratio", "token_pooling"):
        given.expect(name, _PROJECTOR[name], default=_PROJECTOR[name], why=why)
    joint = {**_PROJECTOR, **out["projector_config"]}
    out["projector_config"] = {**joint, "input_dim": int(timm_siglip.width(vision))}
    return out


MAP = ArchMap(
    model_type="deepseek_vl_v2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.deepseek", "vision.timm_siglip", "projectors.deepseek_ocr"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
