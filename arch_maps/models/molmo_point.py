"""MolmoPoint: Molmo 2's parts, and a head that points at patches of the picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import molmo2
from arch_maps.vision import molmo2_vit

_TOKENS: Final = {
    "image_start_token_id": 151936,
    "image_end_token_id": 151937,
    "image_patch_id": 151938,
    "image_high_res_id": 151938,
    "image_col_id": 151939,
    "image_non_indexable_patch_id": 151942,
    "frame_start_token_id": 151943,
    "frame_end_token_id": 151944,
    "patch_token_id": 151947,
    "subpatch_token_id": 151948,
    "location_token_id": 151949,
}
_POINTING: Final = {
    "patch_location": "3x3",
    "patch_embedding_kind": "image_feature0",
    "embed_selected_vit_patch": "linear",
    "token_prediction_rotary": "one_d",
}
"""Choices of the head that this map and the runtime have."""
_LOCATIONS: Final = 9


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("tie_word_embeddings", False, default=False, why="the head has tables of its own")
    facts.expect("layer_norm_x", True, default=True, why="this map has this norm")
    s, v = molmo2.sizes(facts.section("text_config")), molmo2_vit.views(facts, most=None)
    molmo2.stack(root.at(source="model.transformer", target="lm.model"), s, halved=False)
    head = root.at(source="lm_head", target="lm.lm_head")
    head.tensor("output_embeddings", s.vocab, s.hidden, kind=Kind.HEAD)
    head.tensor("new_output_embeddings", s.added, s.hidden, kind=Kind.HEAD)
    tower = root.at(source="model.vit", target="vision_model", part="vision")
    molmo2_vit.tower(tower, v, blocks="resblocks")
    projector = replace(root.at(source="model", target=""), part="projector")
    read = v.vit.size("hidden_size", 1152) * len(v.read)
    molmo2_vit.adapter(projector / "connector", v, s.hidden, last=False)
    if v.adapter.data.get("positional_embeddings"):
        positions = v.adapter.size("positional_embeddings")
        table = projector / "connector.positional_embeddings"
        table.tensor("bias", positions, read, kind=Kind.POSITION)
    projector.linear("build_vit_embedding", s.hidden, read, bias=True)
    point, width = projector / "point_predictor", facts.size("patch_embed_dim", 512)
    point.norm("x_norm", s.hidden)
    sides = {"patch_q": s.hidden, "patch_k": s.hidden, "subpatch_q": s.hidden, "subpatch_k": read}
    for name, inp in sides.items():
        point.linear(name, width, inp, bias=True)
    point.tensor("add_no_point_class_embed.vector", width, kind=Kind.POSITION)
    point.linear("subpatch_loc_k", _LOCATIONS, s.hidden, bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    for name, word in _POINTING.items():
        facts.expect(name, word, default=word, why="this map is checked with this head only")
        out[name] = word
    text = facts.section("text_config")
    s, v = molmo2.sizes(text), molmo2_vit.views(facts, most=None)
    views = molmo2_vit.spell_config(v, int(s.hidden), masked=None)
    views["adapter_config"].update(
        pooling_attention_mask=v.adapter.flag("pooling_attention_mask", False),
        positional_embeddings=v.adapter.data.get("positional_embeddings"),
    )
    out["text_config"].update(molmo2.spell_config(text, s))
    out.update(views, vision_config=views["vit_config"], tie_word_embeddings=False)
    for name, default in _TOKENS.items():
        out[name] = int(facts.size(name, default))
    out.update(
        use_frame_special_tokens=facts.flag("use_frame_special_tokens", True),
        no_more_points_class=facts.flag("no_more_points_class", True),
        patch_embed_dim=int(facts.size("patch_embed_dim", 512)),
        embed_location=facts.flag("embed_location", False),
        layer_norm_x=True,
        norm_logits=facts.flag("norm_logits", True),
        mask_patches=facts.data.get("mask_patches", "always"),
        mask_subpatches=facts.data.get("mask_subpatches", "inference"),
        mask_repeats=facts.data.get("mask_repeats", "inference"),
        token_prediction_rotary_theta=facts.number("token_prediction_rotary_theta", 50000.0),
    )
    return out


MAP = ArchMap(
    model_type="molmo_point",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.molmo2", "vision.molmo2_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=("mlx-vlm 0.7.10 rounds float32 weights to float16 whenever it loads them.",),
)
