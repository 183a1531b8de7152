"""Gemma 4 without encoders: pixels and samples go straight into the text stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.models.gemma4 import embedder, language, spell_tokens
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import gemma4
from arch_maps.vision import gemma4_patches as patches

_LAYOUT: Final = Layout(
    "transformers",
    {"text": "model.language_model", "vision": "model.vision_embedder", "root": "model"},
)
_TEXT: Final = {**gemma4.DEFAULTS, "max_position_embeddings": 262144, "sliding_window": 1024}
_AUDIO: Final = {"audio_embed_dim": 640, "rms_norm_eps": 1e-6}
"""The reference's values."""


def _text(facts: Facts) -> Facts:
    # The reference has neither per-layer embeddings nor experts here, whatever the config says.
    plain = {"hidden_size_per_layer_input": 0, "enable_moe_block": False}
    text = facts.section("text_config").filled(_TEXT)
    return text.filled({"use_bidirectional_attention": "vision"}).overruled(plain)


def _audio_width(facts: Facts) -> int:
    """Samples of a frame, which transformers 5 writes under one name and releases under four."""
    return facts.section("audio_config").filled(_AUDIO).size("audio_embed_dim")


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = gemma4.sizes(_text(facts))
    language(root, layout, s)
    seeing = facts.section("vision_config").filled(patches.DEFAULTS)
    at = root.at(source=layout["vision"], target="vision_embedder", part="vision")
    patches.embedder(at, seeing)
    embedder(root, layout, "embed_vision", s.hidden, seeing.size("output_proj_dims"))
    if facts.data.get("audio_config"):
        embedder(root, layout, "embed_audio", s.hidden, _audio_width(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    seeing = facts.section("vision_config").filled(patches.DEFAULTS)
    out.update(
        text_config=gemma4.spell_config(text, model_type="gemma4_unified_text"),
        vision_config=patches.spell_config(seeing),
        audio_config=None,
    )
    if facts.data.get("audio_config"):
        hearing = facts.section("audio_config").filled(_AUDIO)
        names = ("audio_embed_dim", "audio_samples_per_token", "hidden_size", "output_proj_dims")
        width = int(_audio_width(facts))
        for name in names:
            hearing.expect(name, width, default=width, why="the reference has one width for all")
        out["audio_config"] = {
            **hearing.data,
            **dict.fromkeys(names, width),
            "model_type": "gemma4_unified_audio",
        }
    spell_tokens(out, facts, gemma4.sizes(text))
    return out


MAP = ArchMap(
    model_type="gemma4_unified",
    tensors=_tensors,
    config=_config,
    layouts=(_LAYOUT,),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma4", "vision.gemma4_patches"),
    modalities=("text", "image", "audio"),
    pipeline_tag="image-text-to-text",
)
