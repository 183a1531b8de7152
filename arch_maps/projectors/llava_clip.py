"""LLaVA 1.5 and NeXT: a CLIP tower, a two-layer projector and a Llama or Mistral stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import clip

_MISTRAL: Final = {**llama.DEFAULTS, "intermediate_size": 14336, "num_key_value_heads": 8}
"""The reference's sizes of that stack."""


def text(facts: Facts) -> Facts:
    """The text stack's facts, with the reference's sizes where the release leaves them out."""
    section = facts.section("text_config")
    mistral = section.data.get("model_type") == "mistral"
    return section.filled(_MISTRAL if mistral else llama.DEFAULTS)


def tied(facts: Facts) -> bool:
    """Whether the head is the input embedding, which either config may say."""
    inner = facts.section("text_config").flag("tie_word_embeddings", False)
    return facts.flag("tie_word_embeddings", False) or inner


def tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    """Text stack without its head, tower and projector."""
    vision = facts.section("vision_config")
    vision.expect(
        "model_type",
        "clip_vision_model",
        default="clip_vision_model",
        why="the runtime computes other towers with the wrong activation",
    )
    s = llama.sizes(text(facts))
    llama.stack(parts.text(root, layout), s)
    clip.tower(parts.vision(root, layout), vision)
    width = vision.size("hidden_size", 768)
    parts.two_layers(parts.projector(root, layout), width, s.hidden)


def spell_config(
    config: dict[str, Any], facts: Facts, *, stacks: Sequence[str] = ("llama",)
) -> dict[str, Any]:
    """The config that the runtimes read; ``stacks``: text types that the runtime computes."""
    out = spell.start(config)
    given = text(facts)
    given.expect("model_type", *stacks, default="llama", why="the runtime computes no other stack")
    given.expect("attention_bias", False, default=False, why="one runtime has no such biases")
    given.expect("mlp_bias", False, default=False, why="one runtime has no such biases")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    facts.expect("multimodal_projector_bias", True, default=True, why="the runtime has biases")
    if not isinstance(facts.data.get("vision_feature_layer", -2), int):
        facts.problem("config.json: vision_feature_layer must be one layer; the runtime takes one")
    s = llama.sizes(given)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section = out["text_config"] = {**given.data}
    llama.spell_config(section, given, s, max_positions=2048)
    if section["rope_parameters"]["rope_type"] not in ("default", "linear"):
        facts.problem("config.json: one runtime computes unscaled or linear positions only")
    section.update(
        model_type=given.data.get("model_type", "llama"),
        tie_word_embeddings=tied(facts),
        attention_bias=False,
        mlp_bias=False,
        rope_traditional=False,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
    )
    clip.spell_config(out["vision_config"], facts.section("vision_config"))
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", 32000))
    out.update(
        tie_word_embeddings=tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=image,
        vision_feature_layer=facts.data.get("vision_feature_layer", -2),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "default"),
    )
    return out
