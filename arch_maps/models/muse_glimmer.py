"""Muse Glimmer: a windowed vision tower, a two-layer adapter and a text stack of its own."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import muse
from arch_maps.vision import muse_vit


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text, vision = facts.section("text_config"), facts.section("vision_config")
    s = muse.sizes(text)
    muse.stack(root.at(source="model.language_model", target="language_model.model"), s)
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=None)
    muse_vit.tower(
        root.at(source="model.vision_tower", target="vision_tower", part="vision"), vision
    )
    between = root.at(source="model", target="", part="projector")
    inner = facts.size("projector_hidden_size", 4096)
    between.linear("vision_adapter.fc1", inner, facts.size("out_hidden_size", 6144))
    between.linear("vision_adapter.fc2", inner, inner)
    between.linear("vision_projection", s.hidden, inner)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtime computes exact GELU"
    facts.expect("projector_hidden_act", "gelu", default="gelu", why=why)
    out = spell.start(config)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    s = muse.sizes(text)
    out["text_config"] = muse.spell_config(text, s)
    out["vision_config"] = muse_vit.spell_config(vision)
    out.update(
        out_hidden_size=int(facts.size("out_hidden_size", 6144)),
        projector_hidden_size=int(facts.size("projector_hidden_size", 4096)),
        projector_hidden_act="gelu",
        image_token_id=int(facts.size("image_token_id", 200092)),
        video_token_id=int(facts.size("video_token_id", 200091)),
        vocab_size=int(s.vocab),
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="muse_glimmer",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.muse", "vision.muse_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
