"""Moondream 2, published as moondream1: crops through a ViT, and Phi's parallel blocks."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import moondream
from arch_maps.vision import moondream_vit

_SIZES: Final = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "vocab_size": 51200,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""The released sizes, which published configs leave to the release's code."""


def _text(facts: Facts) -> Facts:
    return moondream_vit.section(facts, "text_config").filled(_SIZES)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text = _text(facts)
    moondream.dense(root, text)
    vision = moondream_vit.section(facts, "vision_config")
    moondream_vit.sides(root, vision, text_hidden=int(text.size("hidden_size")))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = _text(facts), moondream_vit.section(facts, "vision_config")
    out["text_config"] = {
        **{name: int(text.size(name)) for name in _SIZES},
        "model_type": "moondream2",
        "rope_theta": text.number("rope_theta", 10000.0),
        "rope_traditional": False,
        "partial_rotary_factor": text.number("partial_rotary_factor", 0.5),
        "rms_norm_eps": text.number("rms_norm_eps", 1e-5),
    }
    out["vision_config"] = moondream_vit.spell_config(
        vision, model_type="moondream2_vision", eps=1e-5
    )
    out.setdefault("bos_token_id", 0)
    out.setdefault("eos_token_id", 0)
    return out


MAP = ArchMap(
    model_type="moondream1",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.moondream", "vision.moondream_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
