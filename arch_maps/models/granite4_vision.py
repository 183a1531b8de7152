"""Granite 4.0 Vision: SigLIP read at several depths, each added at a layer of Granite's stack."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.projectors import llava as parts
from arch_maps.projectors import window_qformer
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import granite, llama
from arch_maps.vision import siglip

_TEXT = {**llama.DEFAULTS, "tie_word_embeddings": False}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_CORNERS = 4
"""Spatial projectors: one for each patch of a two-by-two block."""


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts.section("text_config").filled(_TEXT))


def _tied(facts: Facts) -> bool:
    return facts.flag("tie_word_embeddings", False) or _sizes(facts).tied


def _targets(facts: Facts) -> list[list[int]]:
    """[tower layer, text layer] of every projector that reads a depth of its own."""
    found = facts.data.get("deepstack_layer_map")
    ok = isinstance(found, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in found)
    if not ok:
        facts.problem("config.json: deepstack_layer_map must list pairs of layers")
        return []
    assert isinstance(found, list)
    return [list(pair) for pair in found]


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    llama.stack(parts.text(root, layout), s)
    head = root.at(source=layout["head"], target="language_model")
    if _tied(facts):
        table = f"{layout['text']}.embed_tokens.weight"
        head.copied_head("lm_head", s.vocab, s.hidden, tied_to=table)
    else:
        head.head("lm_head", s.vocab, s.hidden, tied_to=None)
    vision = facts.section("vision_config").filled(siglip.DEFAULTS)
    tower = parts.vision(root, layout)
    siglip.tower(tower, vision)
    siglip.pooling_head(tower / "head", vision)
    outer = root.at(source=layout["root"], target="", part="projector")
    outer.tensor("image_newline", s.hidden, kind=Kind.POSITION)
    counts = {"layerwise_projectors": len(_targets(facts)), "spatial_projectors": _CORNERS}
    for name, count in counts.items():
        for _, at in outer.layers(name, count):
            window_qformer.projector(at, facts, vision.size("hidden_size"), s.hidden)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    text, vision = facts.section("text_config").filled(_TEXT), facts.section("vision_config")
    vision.expect("vision_use_head", True, default=True, why="the runtime has a pooling head")
    vision.expect(
        "model_type",
        "siglip_vision_model",
        default="clip_vision_model",
        why="the runtime computes no other tower",
    )
    if text.data.get("shared_intermediate_size") is not None:
        facts.problem("config.json: text_config.shared_intermediate_size: this map has plain MLPs")
    window_qformer.expect_fixed(facts, int(vision.size("hidden_size")))
    s = _sizes(facts)
    section = out["text_config"] = {**text.data}
    llama.spell_config(section, text, s, max_positions=2048)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    section.update(
        granite.scales(text),
        model_type="granite4_vision_text",
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        rope_traditional=False,
        shared_intermediate_size=None,
        tie_word_embeddings=_tied(facts),
    )
    siglip.spell_config(out["vision_config"], vision)
    corners = facts.data.get("spatial_target_layers") or [12, 15, 18, 21]
    targets = [pair[1] for pair in _targets(facts)] + list(corners)
    if len(set(targets)) != len(targets) or len(corners) != _CORNERS:
        facts.problem("config.json: the layers that pictures are added at must all differ")
    out.update(
        tie_word_embeddings=_tied(facts),
        vocab_size=int(s.vocab),
        image_token_index=int(
            facts.size("image_token_index", facts.data.get("image_token_id", 32000))
        ),
        vision_feature_select_strategy=facts.data.get("vision_feature_select_strategy", "default"),
        image_grid_pinpoints=facts.data.get("image_grid_pinpoints") or _PINPOINTS,
        deepstack_layer_map=_targets(facts),
        use_spatial_sampling=True,
        spatial_vision_layer=facts.data.get("spatial_vision_layer", -1),
        spatial_target_layers=list(corners),
        use_image_newline_parameter=True,
    )
    return out


MAP = ArchMap(
    model_type="granite4_vision",
    tensors=_tensors,
    config=_config,
    layouts=parts.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.siglip", "projectors.window_qformer"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
)
