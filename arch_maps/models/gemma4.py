"""Gemma 4: dense, with experts, or with per-layer embeddings; pictures, and sounds where it hears.

A release says by its config which of these it is.
"""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.audio import gemma4_conformer as audio
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma4 as text
from arch_maps.vision import gemma4_vit as vision

LAYOUT = Layout(
    "transformers",
    {
        "text": "model.language_model",
        "vision": "model.vision_tower",
        "audio": "model.audio_tower",
        "root": "model",
    },
)


def text_facts(facts: Facts) -> Facts:
    """The text section with the reference's defaults."""
    return facts.section("text_config").filled(text.DEFAULTS)


def language(root: Mount, layout: Layout, s: text.Sizes) -> None:
    """The text stack and its head, which is always tied."""
    text.stack(root.at(source=layout["text"], target="language_model.model"), s)
    root.head("lm_head", s.vocab, s.hidden, tied_to=f"{layout['text']}.embed_tokens.weight")


def embedder(root: Mount, layout: Layout, name: str, out: int, inp: int) -> None:
    """The projection of soft tokens into the text stack; its norm has no weights."""
    at = root.at(source=layout["root"], target="", part="projector")
    at.linear(f"{name}.embedding_projection", out, inp)


def spell_tokens(out: dict[str, Any], facts: Facts, s: text.Sizes) -> None:
    """What both runtimes read at the top of the config, in place."""
    end = facts.data.get("eoa_token_id") or facts.data.get("eoa_token_index") or 258883
    out.update(
        vocab_size=int(s.vocab),
        hidden_size=int(s.hidden),
        image_token_id=int(facts.size("image_token_id", 258880)),
        audio_token_id=int(facts.size("audio_token_id", 258881)),
        video_token_id=int(facts.size("video_token_id", 258884)),
        boi_token_id=int(facts.size("boi_token_id", 255999)),
        eoi_token_id=int(facts.size("eoi_token_id", 258882)),
        boa_token_id=int(facts.size("boa_token_id", 256000)),
        eoa_token_id=end,
        eoa_token_index=end,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = text.sizes(text_facts(facts))
    language(root, layout, s)
    seeing = facts.section("vision_config").filled(vision.DEFAULTS)
    at = root.at(source=layout["vision"], target="vision_tower", part="vision")
    vision.tower(at, seeing)
    embedder(root, layout, "embed_vision", s.hidden, seeing.size("hidden_size"))
    if facts.data.get("audio_config"):
        hearing = facts.section("audio_config").filled(audio.DEFAULTS)
        at = root.at(source=layout["audio"], target="audio_tower", part="audio")
        audio.tower(at, hearing)
        embedder(root, layout, "embed_audio", s.hidden, hearing.size("output_proj_dims"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    section = text_facts(facts)
    tokens = int(facts.size("vision_soft_tokens_per_image", 280))
    seeing = facts.section("vision_config").filled(vision.DEFAULTS)
    out.update(
        text_config=text.spell_config(section),
        vision_config=vision.spell_config(seeing, output_length=tokens),
        audio_config=None,
        vision_soft_tokens_per_image=tokens,
    )
    if facts.data.get("audio_config"):
        hearing = facts.section("audio_config").filled(audio.DEFAULTS)
        out["audio_config"] = audio.spell_config(hearing)
    spell_tokens(out, facts, text.sizes(section))
    return out


MAP = ArchMap(
    model_type="gemma4",
    tensors=_tensors,
    config=_config,
    layouts=(LAYOUT,),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma4", "vision.gemma4_vit", "audio.gemma4_conformer"),
    modalities=("text", "image", "audio"),
    pipeline_tag="image-text-to-text",
)
