"""Moondream 3: crops through a ViT, and a stack of parallel blocks, most of them experts."""

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
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "rope_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1024,
    "moe_start_layer": 4,
    "prefix_attn": 730,
}
"""The released sizes, which published configs leave to the release's code."""


def _text(facts: Facts) -> Facts:
    return moondream_vit.section(facts, "text_config").filled(_SIZES)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    text = _text(facts)
    moondream.experts(root, text)
    vision = moondream_vit.section(facts, "vision_config")
    moondream_vit.sides(root, vision, text_hidden=int(text.size("hidden_size")))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = _text(facts), moondream_vit.section(facts, "vision_config")
    text.expect("attention_bias", True, default=True, why="this map is checked with these biases")
    out["text_config"] = {
        **{name: int(text.size(name)) for name in _SIZES},
        "model_type": "moondream3",
        "rope_theta": text.number("rope_theta", 1500000.0),
        "rms_norm_eps": text.number("rms_norm_eps", 1e-5),
        "attention_bias": True,
    }
    out["vision_config"] = moondream_vit.spell_config(
        vision, model_type="moondream3_vision", eps=1e-6
    )
    out.setdefault("bos_token_id", 0)
    out.setdefault("eos_token_id", 0)
    return out


MAP = ArchMap(
    model_type="moondream3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.moondream", "vision.moondream_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 makes the mask by which a picture's tokens see each other, and its "
        "generation does not hand it on: pictures are read backwards only.",
        "mlx-vlm 0.7.10 hands conversations of this type to transformers as bare text, which 5.24 "
        "refuses: mlx_vlm.generate needs transformers 5.23.",
    ),
)
