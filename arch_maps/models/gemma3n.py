"""Gemma 3n: text, pictures and sounds; per-layer embeddings, shared keys and values."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.audio import gemma3n_conformer as audio
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma3n as text
from arch_maps.vision import mobilenetv5 as vision

_PUBLISHED: Final = "published"


def _sections(facts: Facts) -> tuple[Facts, Facts, Facts]:
    """The text, vision and audio sections with the reference's defaults."""
    return (
        facts.section("text_config").filled(text.DEFAULTS),
        facts.section("vision_config").filled(vision.DEFAULTS),
        facts.section("audio_config").filled(audio.DEFAULTS),
    )


def _embedder(at: Mount, facts: Facts, out: int) -> None:
    """A medium's own tokens and soft tokens, projected into the text stack."""
    width = facts.size("hidden_size")
    at.embedding("embedding", facts.size("vocab_size"), width)
    at.norm("hard_embedding_norm", width)
    at.norm("soft_embedding_norm", width)
    at.linear("embedding_projection", out, width)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    words, seeing, hearing = _sections(facts)
    s = text.sizes(words)
    # Named as mlx-lm has them; mlx-vlm renames these and only these.
    model = root / "model"
    text.stack(model / "language_model", s, unshared=layout.name == _PUBLISHED)
    tied = "model.language_model.embed_tokens.weight"
    root.head("lm_head", s.vocab, s.hidden, tied_to=tied)
    tower = "vision_tower.timm_model"
    vision.tower(model.at(source=tower, target=tower, part="vision"), seeing)
    tower = "audio_tower"
    audio.tower(model.at(source=tower, target=tower, part="audio"), hearing)
    for name, medium in (("embed_vision", seeing), ("embed_audio", hearing)):
        _embedder(model.at(source=name, target=name, part="projector"), medium, s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    words, seeing, hearing = _sections(facts)
    s = text.sizes(words)
    out.update(
        text_config=text.spell_config(words),
        vision_config=vision.spell_config(seeing),
        audio_config=audio.spell_config(hearing),
        vocab_size=int(s.vocab),
        hidden_size=int(s.hidden),
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    image = int(facts.size("image_token_id", 262145))
    out.update(image_token_id=image, image_token_index=image)
    for name, default in (
        ("audio_token_id", 262273),
        ("vision_soft_tokens_per_image", 256),
        ("audio_soft_tokens_per_image", 188),
    ):
        out[name] = int(facts.size(name, default))
    return out


MAP = ArchMap(
    model_type="gemma3n",
    tensors=_tensors,
    config=_config,
    layouts=(Layout(_PUBLISHED, {}), Layout("transformers 5", {})),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma3n", "vision.mobilenetv5", "audio.gemma3n_conformer"),
    modalities=("text", "image", "audio"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 hands a picture's tokens over column by column, where the release means "
        "them row by row (MobileNetV5MultiScaleFusionAdapter in its vision.py), pads the tower's "
        "strided convolutions on both sides, and computes exact GELU there for its tanh form.",
        "The tower of pictures is of a size that mlx-vlm has in code. transformers takes it from "
        "timm; without that library the reference is built without the tower, text and sounds are "
        "judged, and the report says that pictures are not.",
    ),
)
