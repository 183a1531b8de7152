"""Aya Vision and Command A Vision: SigLIP tiles shuffled into channels, and Cohere's stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.rules import Layout, Mount
from arch_maps.text import cohere, llama
from arch_maps.text.windows import interval, layer_types
from arch_maps.vision import siglip

_TEXT: Final = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
"""The reference's sizes of the stack."""


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def tensors(
    root: Mount, facts: Facts, layout: Layout, *, intermediate: int | None, normed: bool
) -> None:
    """Text, tower and projector.

    ``intermediate`` is the reference's width inside the projector, None for the text's;
    ``normed``: the projector begins with a norm.
    """
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtime reuses the input embedding"
    )
    s = cohere.sizes(_text(facts))
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=True)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    siglip.tower(parts.vision(root, layout), vision)
    side = facts.size("downsample_factor", 2)
    joined = vision.size("hidden_size") * side * side
    inner = facts.size("alignment_intermediate_size", intermediate or int(s.hidden))
    projector = parts.projector(root, layout)
    if normed:
        projector.norm("layernorm", joined, bias=True)
    projector.linear("linear_1", inner, joined, bias=True)
    projector.linear("linear_2", s.hidden, inner // 2, bias=True)


def spell_config(
    config: dict[str, Any], facts: Facts, *, intermediate: int | None
) -> dict[str, Any]:
    """The config that the runtime reads."""
    out = spell.start(config)
    text, vision = _text(facts), facts.section("vision_config")
    text.expect("model_type", "cohere2", default="cohere2", why="the runtime has no other stack")
    text.expect("use_qk_norm", False, default=False, why="the runtime has no such norms")
    vision.expect("vision_use_head", False, default=False, why="the runtime has no pooling head")
    if not isinstance(facts.data.get("vision_feature_layer", -1), int):
        facts.problem("config.json: vision_feature_layer must be one layer; the runtime takes one")
    s = cohere.sizes(text)
    section = out["text_config"] = {**text.data}
    cohere.spell_config(section, text, s, theta=10000.0)
    kinds = layer_types(text, s.layers, pattern=int(text.size("sliding_window_pattern")))
    section.update(
        model_type="cohere2",
        layer_types=kinds,
        sliding_window=int(text.size("sliding_window")),
        sliding_window_pattern=interval(text, kinds),
    )
    siglip.spell_config(out["vision_config"], vision)
    out["vision_config"]["vision_use_head"] = False
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", 255036))
    out.update(
        tie_word_embeddings=True,
        alignment_intermediate_size=int(
            facts.size("alignment_intermediate_size", intermediate or int(s.hidden))
        ),
        downsample_factor=int(facts.size("downsample_factor", 2)),
        image_token_id=image,
        image_token_index=image,
        vision_feature_layer=facts.data.get("vision_feature_layer", -1),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "full"),
    )
    return out
