"""HunyuanOCR: a tower with line ends in its merger, and HunYuan's dense stack."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import hunyuan_vit

_MARKS: Final = {
    "image_start_token_id": ("im_start_id", 120118),
    "image_end_token_id": ("im_end_id", 120119),
    "image_newline_token_id": ("im_newline_id", 120121),
}
"""The runtime's names of picture marks: transformers' name and the released id."""


def _text(facts: Facts) -> Facts:
    return facts.nested("text_config")


def _sizes(facts: Facts) -> llama.Sizes:
    text = _text(facts)
    text.expect("tie_word_embeddings", True, default=True, why="the runtime has no other head")
    found = llama.sizes(text, qk_norm=True, tied=True)
    return replace(found, qk_norms=("query_layernorm", "key_layernorm"), mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = _sizes(facts), facts.section("vision_config")
    llama.stack(root.at(source="model", target="language_model.model"), s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")
    tower = root.at(source="vit", target="vision_tower", part="vision")
    hunyuan_vit.tower(tower, vision)
    hunyuan_vit.merger(replace(tower / "perceive", part="projector"), vision, s.hidden)


def _positions(text: Facts, s: llama.Sizes) -> dict[str, Any]:
    """Static NTK positions, which the release calls ``xdrope`` and transformers ``dynamic``."""
    rope = spell.rope(text)
    section = rope.get("xdrope_section") or rope.get("mrope_section")
    if rope["rope_type"] not in ("xdrope", "dynamic") or not rope.get("alpha"):
        text.problem("config.json: rope_scaling must have an alpha; the runtime has no other kind")
    if not isinstance(section, list) or sum(section) * 2 != s.head_dim:
        text.problem(f"config.json: xdrope_section must share out {int(s.head_dim) // 2} of a head")
    found = spell.spell_rope({**rope, "rope_type": "xdrope", "xdrope_section": section})
    found["rope_parameters"]["mrope_section"] = section
    return found


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, text, s = spell.start(config), _text(facts), _sizes(facts)
    text.expect("use_qk_norm", True, default=True, why="the reference always has these norms")
    llama.expect_silu(text)
    section = copy.deepcopy(dict(text.data))
    for name in ("vision_config", "auto_map", "architectures"):
        section.pop(name, None)
    section.update(
        model_type="hunyuan_vl",
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        attention_bias=s.attention_bias,
        mlp_bias=False,
        use_qk_norm=True,
        tie_word_embeddings=True,
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(text.size("max_position_embeddings", 2048)),
        **_positions(text, s),
    )
    hunyuan_vit.spell_config(out["vision_config"], facts.section("vision_config"))
    for ours, (theirs, default) in _MARKS.items():
        stated = facts.data.get(ours, facts.data.get(theirs))
        out[ours] = out[theirs] = default if stated is None else stated
    out.setdefault("image_token_id", 120120)
    out.update(text_config=section, tie_word_embeddings=True)
    return out


MAP = ArchMap(
    model_type="hunyuan_vl",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.hunyuan_vit"),
    modalities=("text",),
    pipeline_tag="image-text-to-text",
    remarks=(
        "Pictures are not judged: mlx-vlm 0.7.10 shares out a head's frequencies among the axes of "
        "positions in another order than the release, and resamples the tower's table otherwise.",
    ),
)
