"""Mistral Small 3.1 and 3.2: a Pixtral tower whose patches are merged, and the Mistral stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import pixtral


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts.section("text_config"), kv_heads=8)


def _tied(facts: Facts) -> bool:
    # The reference ties by default but keeps a head that the release brings, as all of them do.
    return facts.flag("tie_word_embeddings", False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    vision = facts.section("vision_config").filled(pixtral.DEFAULTS)
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=_tied(facts))
    pixtral.tower(parts.vision(root, layout), vision)
    projector = parts.projector(root, layout)
    width, side = vision.size("hidden_size"), facts.size("spatial_merge_size", 2)
    projector.norm("norm", width)
    projector.linear("patch_merger.merging_layer", width, width * side * side)
    bias = facts.flag("multimodal_projector_bias", False)
    parts.two_layers(projector, width, s.hidden, bias=bias)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = facts.section("text_config")
    text.expect("model_type", "mistral", default="mistral", why="this map has no other stack")
    text.expect("sliding_window", None, default=None, why="the runtimes attend to everything")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    if not isinstance(facts.data.get("vision_feature_layer", -1), int):
        facts.problem("config.json: vision_feature_layer must be one layer; the runtime takes one")
    s = _sizes(facts)
    section = out["text_config"]
    llama.spell_config(section, text, s, max_positions=4096 * 32)
    section.update(
        model_type="mistral",
        tie_word_embeddings=_tied(facts),
        attention_bias=False,
        mlp_bias=False,
        use_qk_norm=False,
        rope_traditional=False,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
    )
    pixtral.spell_config(out["vision_config"], facts.section("vision_config"))
    image = facts.data.get("image_token_index", facts.data.get("image_token_id", 10))
    out.update(
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=image,
        vision_feature_layer=facts.data.get("vision_feature_layer", -1),
        vision_feature_select_strategy="full",
        spatial_merge_size=int(facts.size("spatial_merge_size", 2)),
        multimodal_projector_bias=facts.flag("multimodal_projector_bias", False),
    )
    return out


MAP = ArchMap(
    model_type="mistral3",
    tensors=_tensors,
    config=_config,
    layouts=parts.PIXTRAL_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "vision.pixtral", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
