"""Llama 4 Scout and Maverick: tiles through a rotary tower, and experts that see chunks."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, llama4, moe
from arch_maps.vision import llama4_vit


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(llama4.DEFAULTS)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text = _text(facts)
    s = llama.sizes(text)
    llama4.stack(root / "language_model.model", text, s)
    moe.untied(facts.section("text_config"))
    (root / "language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    vision = facts.section("vision_config")
    tower = root.at(source="vision_model", target="vision_model", part="vision")
    llama4_vit.tower(tower, vision)
    width = vision.filled(llama4_vit.DEFAULTS).size("vision_output_dim")
    name = "multi_modal_projector"
    root.at(source=name, target=name, part="projector").linear("linear_1", s.hidden, width)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    section = out["text_config"] = {**text.data}
    llama4.spell_config(section, text, llama.sizes(text))
    section["model_type"] = "llama4_text"
    llama4_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", 200092))
    out.update(image_token_index=image, image_token_id=image, tie_word_embeddings=False)
    return out


MAP = ArchMap(
    model_type="llama4",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama4", "vision.llama4_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "The runtimes norm queries and keys with an epsilon of 1e-6, whatever the release says.",
        "mlx-vlm 0.7.10 computes x*sigmoid(1.7x) in the tower for exact GELU, stretches pictures "
        "where the release pads them, and leaves out the small whole picture beside the tiles.",
    ),
)
