"""Step 3.7: a Perception Encoder tower, one dense layer and the Step text stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import step
from arch_maps.vision import perception


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text, vision = facts.section("text_config"), facts.section("vision_config")
    s = step.sizes(text)
    step.stack(root.at(source=layout["text"], target="language_model.model"), s)
    step.drop_mtp(root, text, s, text=layout["text"])
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    tower = root.at(source=layout["vision"], target="vision_model", part="vision")
    perception.tower(tower, vision)
    between = root.at(source=layout["between"], target="", part="projector")
    bias = facts.flag("projector_bias", False)
    between.linear("vit_large_projector", s.hidden, 4 * perception.width(vision), bias=bias)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    s = step.sizes(text)
    image = int(facts.size("image_token_id", 151679))
    out["text_config"] = step.spell_config(text, s)
    out["vision_config"] = perception.spell_config(vision)
    out.update(
        projector_bias=facts.flag("projector_bias", False),
        understand_projector_stride=2,
        image_token_id=image,
        image_token_index=image,
        vocab_size=int(s.vocab),
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="step3p7",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {"text": "model", "vision": "vision_model", "between": ""}),),
    runtimes=("mlx-vlm",),
    parts=("text.step", "vision.perception"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
