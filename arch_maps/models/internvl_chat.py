"""InternVL 2 to 3.5 as OpenGVLab releases them: an InternViT tower and Qwen2's or Qwen3's stack."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.vision import intern_vit


def _sizes(facts: Facts) -> llama.Sizes:
    text = facts.section("llm_config")
    text.expect("model_type", "qwen2", "qwen3", default="qwen2", why="the runtime has no other")
    if text.data.get("model_type") == "qwen3":
        why = "the runtime has Qwen3's norms only without biases"
        text.expect("attention_bias", False, default=False, why=why)
        return llama.sizes(text, kv_heads=32, head_dim=128, qk_norm=True)
    return replace(llama.sizes(text, kv_heads=32, qkv_bias=True), attention_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, vision = _sizes(facts), facts.section("vision_config")
    text = root / "language_model"
    llama.stack(text / "model", s)
    table = "language_model.model.embed_tokens.weight"
    text.head("lm_head", s.vocab, s.hidden, tied_to=table if s.tied else None)
    tower = root.at(source="vision_model", target="vision_model", part="vision")
    intern_vit.released_tower(tower, vision)
    facts.expect("downsample_ratio", 0.5, default=0.5, why="this map is checked with a half")
    joined = vision.size("hidden_size") * 4
    projector = root.at(source="mlp1", target="mlp1", part="projector")
    projector.norm("0", joined, bias=True)
    projector.linear("1", s.hidden, joined, bias=True)
    projector.linear("3", s.hidden, s.hidden, bias=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    text = facts.section("llm_config")
    text.expect("use_sliding_window", False, default=False, why="the runtime attends to everything")
    facts.expect("select_layer", -1, default=-1, why="the runtime takes the last layer")
    facts.expect("ps_version", "v2", default="v1", why="the runtime shuffles as version 2 does")
    section = copy.deepcopy(dict(text.data))
    types = ("default", "dynamic")
    llama.spell_config(section, text, s, max_positions=32768, theta=1e6, rope_types=types)
    if section["rope_parameters"]["rope_type"] == "dynamic":
        longest = section["max_position_embeddings"]
        facts.note(
            f"positions past {longest} are not stretched, where the release does so (dynamic NTK)"
        )
        plain = {"rope_type": "default", "rope_theta": section["rope_theta"]}
        section.update(spell.spell_rope(plain))
    section.update(attention_bias=s.qkv_bias, rope_traditional=False)
    intern_vit.spell_released(out["vision_config"], facts.section("vision_config"))
    out.update(
        text_config=section,
        downsample_ratio=0.5,
        tie_word_embeddings=s.tied,
        vocab_size=int(s.vocab),
    )
    return out


MAP = ArchMap(
    model_type="internvl_chat",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "vision.intern_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "mlx-vlm 0.7.10 computes the tanh form of GELU in the tower, where the release means the "
        "exact one.",
    ),
)
