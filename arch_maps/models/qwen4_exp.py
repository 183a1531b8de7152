"""Qwen4-Exp with vision: gated residual streams, chosen tokens, n-gram tables, Qwen's tower."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import qwen3_5, qwen3_5_moe, qwen4_exp
from arch_maps.vision import qwen_vit

_PLACES = {"text": "model.language_model", "vision": "model.visual"}
_WHOLE = "n-gram tables whole"


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    text = qwen4_exp.read(facts.section("text_config"))
    s = qwen3_5_moe.sizes(text)
    qwen4_exp.stack(
        root.at(source=layout["text"], target="language_model.model"),
        text,
        s,
        fused=layout.fused_experts,
        whole=layout.name.endswith(_WHOLE),
    )
    tied = f"{layout['text']}.embed_tokens.weight" if qwen3_5.tied(facts) else None
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=tied)
    tower = root.at(source=layout["vision"], target="vision_tower", part="vision")
    qwen_vit.tower(tower, facts.section("vision_config"))
    qwen4_exp.drop_mtp(root, text, s, fused=layout.fused_experts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    tied = qwen3_5.tied(facts)
    text, vision = facts.section("text_config"), facts.section("vision_config")
    qwen4_exp.spell_config(out["text_config"], text, tied=tied)
    qwen_vit.spell_config(out["vision_config"], vision, model_type="qwen4_exp")
    out.update(
        tie_word_embeddings=tied,
        vocab_size=int(text.size("vocab_size")),
        **qwen3_5.media_tokens(facts),
    )
    return out


MAP = ArchMap(
    model_type="qwen4_exp",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("fused experts", _PLACES, fused_experts=True),
        Layout("a tensor per expert", _PLACES),
        Layout(f"fused experts, {_WHOLE}", _PLACES, fused_experts=True),
        Layout(f"a tensor per expert, {_WHOLE}", _PLACES),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.qwen4_exp", "text.qwen3_5", "text.moe", "vision.qwen_vit"),
    modalities=("text", "image"),
    pipeline_tag="image-text-to-text",
    remarks=(
        "Blocks of tokens that no head of the indexer scores above zero tie, and torch and MLX may "
        "choose others of these.",
        "On a GPU and in 16 bits mlx-vlm attends to chosen blocks by a Metal kernel of its own, "
        "which no check on a CPU runs.",
    ),
)
