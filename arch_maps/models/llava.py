"""LLaVA 1.5: a CLIP tower, a two-layer projector and the Llama stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import clip


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(llama.DEFAULTS)


def _tied(facts: Facts) -> bool:
    inner = facts.section("text_config").flag("tie_word_embeddings", False)
    return facts.flag("tie_word_embeddings", False) or inner


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    vision = facts.section("vision_config")
    vision.expect(
        "model_type",
        "clip_vision_model",
        default="clip_vision_model",
        why="the runtime computes other towers with the wrong activation",
    )
    s = llama.sizes(_text(facts))
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=_tied(facts))
    clip.tower(parts.vision(root, layout), vision)
    parts.two_layers(parts.projector(root, layout), vision.size("hidden_size", 768), s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    text.expect("model_type", "llama", default="llama", why="one runtime computes no other stack")
    text.expect("attention_bias", False, default=False, why="one runtime has no such biases")
    text.expect("mlp_bias", False, default=False, why="one runtime has no such biases")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("multimodal_projector_bias", True, default=True, why="the runtime has biases")
    if not isinstance(facts.data.get("vision_feature_layer", -2), int):
        facts.problem("config.json: vision_feature_layer must be one layer; the runtime takes one")
    s = llama.sizes(text)
    section = out["text_config"] = {**llama.DEFAULTS, **out["text_config"], "model_type": "llama"}
    llama.spell_config(section, text, s, max_positions=2048)
    if section["rope_parameters"]["rope_type"] not in ("default", "linear"):
        facts.problem("config.json: one runtime computes unscaled or linear positions only")
    section.update(
        tie_word_embeddings=_tied(facts),
        attention_bias=False,
        mlp_bias=False,
        rope_traditional=False,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
    )
    clip.spell_config(out["vision_config"], facts.section("vision_config"))
    out.update(
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=facts.data.get(
            "image_token_index", facts.data.get("image_token_id", 32000)
        ),
        vision_feature_layer=facts.data.get("vision_feature_layer", -2),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "default"),
    )
    return out


MAP = ArchMap(
    model_type="llava",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "vision.clip", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10's processor for this type passes the image processor text settings, which "
        "transformers 5 refuses; with pictures prepared by the release's own, outputs agree.",
    ),
)
