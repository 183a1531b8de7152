"""LFM2-VL and LFM2.5-VL: SigLIP 2 over tiles, pixel unshuffle, and the LFM2 stack."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import lfm2
from arch_maps.vision import siglip2

_TEXT: Final = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
"""The reference's sizes of the stack."""


def _text(facts: Facts) -> Facts:
    return facts.section("text_config").filled(_TEXT)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    for name in ("tie_embedding", "tie_word_embeddings"):
        facts.expect(name, True, default=True, why="the runtimes reuse the input embedding")
    s = lfm2.sizes(_text(facts))
    lfm2.stack(parts.text(root, layout), s)
    parts.head(root, layout, s.vocab, s.hidden, tied=True)
    vision = facts.section("vision_config").filled(siglip2.DEFAULTS)
    siglip2.tower(parts.vision(root, layout, "vision_tower"), vision)
    side = facts.size("downsample_factor", 2)
    joined = vision.size("hidden_size") * side * side
    inner, bias = facts.size("projector_hidden_size", 2560), facts.flag("projector_bias", True)
    projector = parts.projector(root, layout)
    if facts.flag("projector_use_layernorm", True):
        projector.norm("layer_norm", joined, bias=True)
    projector.linear("linear_1", inner, joined, bias=bias)
    projector.linear("linear_2", s.hidden, inner, bias=bias)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text = _text(facts)
    text.expect("model_type", "lfm2", default="lfm2", why="the runtimes compute no other stack")
    facts.expect("projector_hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
    # The reference reads the last layer whatever the config says; the runtime would cut layers off.
    facts.expect("vision_feature_layer", -1, default=-1, why="the runtime drops the layers above")
    section = out["text_config"] = {**text.data}
    lfm2.spell_config(section, text, lfm2.sizes(text))
    section.update(model_type="lfm2", tie_word_embeddings=True)
    siglip2.spell_config(out["vision_config"], facts.section("vision_config"))
    out.pop("auto_map", None)
    image = int(facts.size("image_token_id", 396))
    out.update(
        # The one spelling that both runtimes know.
        model_type="lfm2-vl",
        tie_word_embeddings=True,
        downsample_factor=int(facts.size("downsample_factor", 2)),
        image_token_id=image,
        image_token_index=image,
        projector_bias=facts.flag("projector_bias", True),
        projector_hidden_act="gelu",
        projector_hidden_size=int(facts.size("projector_hidden_size", 2560)),
        projector_use_layernorm=facts.flag("projector_use_layernorm", True),
        vision_feature_layer=-1,
    )
    return out


MAP = ArchMap(
    model_type="lfm2_vl",
    tensors=_tensors,
    config=_config,
    layouts=parts.NESTED_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.lfm2", "vision.siglip2", "projectors.llava"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
