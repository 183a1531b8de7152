"""Pixtral and Mistral 3: a Pixtral tower, a two-layer projector and a Mistral stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.models import ministral3
from arch_maps.projectors import llava as parts
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import pixtral

_TEXT: Final = {"num_attention_heads": 32, "num_key_value_heads": 8}
"""The reference's sizes that releases leave out."""


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def _tied(facts: Facts) -> bool:
    # The reference ties by default but keeps a head that the release brings, as all of them do.
    return facts.flag("tie_word_embeddings", False)


def tensors(root: Mount, facts: Facts, layout: Layout, *, merged: bool) -> None:
    """Text, tower and projector; ``merged``: patches are joined before the projector."""
    vision = facts.section("vision_config").filled(pixtral.DEFAULTS)
    s = llama.sizes(_text(facts))
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=_tied(facts))
    pixtral.tower(parts.vision(root, layout), vision)
    projector = parts.projector(root, layout)
    width = vision.size("hidden_size")
    if merged:
        side = facts.size("spatial_merge_size", 2)
        projector.norm("norm", width)
        projector.linear("patch_merger.merging_layer", width, width * side * side)
    bias = facts.flag("multimodal_projector_bias", not merged)
    parts.two_layers(projector, width, s.hidden, bias=bias)


def spell_config(
    config: dict[str, Any], facts: Facts, *, model_type: str, image_token: int
) -> dict[str, Any]:
    """The config that the runtimes read; ``image_token`` is the reference's default."""
    out = spell.start(config)
    text = _text(facts)
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    if not isinstance(facts.data.get("vision_feature_layer", -1), int):
        facts.problem("config.json: vision_feature_layer must be one layer; the runtime takes one")
    s = llama.sizes(text)
    if text.data.get("model_type") == "ministral3":
        out["text_config"] = ministral3.MAP.config(dict(text.data), text)
    else:
        _spell_mistral(out["text_config"], facts, text, s)
    out["text_config"].update(
        num_attention_heads=int(s.heads),
        tie_word_embeddings=_tied(facts),
        attention_bias=False,
        mlp_bias=False,
        use_qk_norm=False,
        rope_traditional=False,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
    )
    pixtral.spell_config(out["vision_config"], facts.section("vision_config"))
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", image_token))
    out.update(
        model_type=model_type,
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=image,
        vision_feature_layer=facts.data.get("vision_feature_layer", -1),
        vision_feature_select_strategy="full",
    )
    return out


def _spell_mistral(section: dict[str, Any], facts: Facts, text: Facts, s: llama.Sizes) -> None:
    text.expect("model_type", "mistral", default="mistral", why="this map has no other stack")
    # Asked of what is stated: a null there is no window, an absent key the reference's default.
    facts.section("text_config").expect(
        "sliding_window", None, default=4096, why="the runtimes attend to everything"
    )
    llama.spell_config(section, text, s, max_positions=4096 * 32)
    section["model_type"] = "mistral"
