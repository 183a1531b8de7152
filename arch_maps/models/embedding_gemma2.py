"""EmbeddingGemma 2: texts, and pictures and sounds through Gemma 4's towers, as one embedding."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.audio import gemma4_conformer as audio
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import embedding_gemma2 as text
from arch_maps.vision import gemma4_vit as vision


def _embedder(root: Mount, name: str, out: int, inp: int) -> None:
    at = root.at(source="", target="", part="projector")
    at.linear(f"{name}.embedding_projection", out, inp)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = text.sizes(facts.section("text_config").filled(text.DEFAULTS))
    text.stack(root / "language_model", s)
    if facts.data.get("vision_config"):
        seeing = facts.section("vision_config").filled(vision.DEFAULTS)
        tower = root.at(source="vision_tower", target="vision_tower", part="vision")
        vision.tower(tower, seeing)
        _embedder(root, "embed_vision", s.hidden, seeing.size("hidden_size"))
    if facts.data.get("audio_config"):
        hearing = facts.section("audio_config").filled(audio.DEFAULTS)
        tower = root.at(source="audio_tower", target="audio_tower", part="audio")
        audio.tower(tower, hearing)
        _embedder(root, "embed_audio", s.hidden, hearing.size("output_proj_dims"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    tokens = int(facts.size("vision_soft_tokens_per_image", 280))
    out.update(
        text_config=text.spell_config(facts.section("text_config").filled(text.DEFAULTS)),
        vision_config=None,
        audio_config=None,
        vision_soft_tokens_per_image=tokens,
        image_token_id=int(facts.size("image_token_id", 258880)),
        audio_token_id=int(facts.size("audio_token_id", 258881)),
        video_token_id=int(facts.size("video_token_id", 258884)),
        boi_token_id=int(facts.size("boi_token_id", 255999)),
        eoi_token_id=int(facts.size("eoi_token_id", 258882)),
        boa_token_id=int(facts.size("boa_token_id", 256000)),
        eoa_token_index=int(facts.size("eoa_token_index", 258883)),
    )
    if facts.data.get("vision_config"):
        seeing = facts.section("vision_config").filled(vision.DEFAULTS)
        out["vision_config"] = vision.spell_config(seeing, output_length=tokens)
    if facts.data.get("audio_config"):
        hearing = facts.section("audio_config").filled(audio.DEFAULTS)
        out["audio_config"] = audio.spell_config(hearing)
    return out


MAP = ArchMap(
    model_type="embedding_gemma2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.embedding_gemma2", "vision.gemma4_vit", "audio.gemma4_conformer"),
    modalities=("text", "image", "audio"),
    pipeline_tag="sentence-similarity",
)
