"""Qwen3.5 mixtures of experts without vision."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import qwen3_5, qwen3_5_moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = qwen3_5_moe.sizes(facts)
    experts = qwen3_5_moe.feed_forward(facts, fused=layout.fused_experts)
    # The runtime adds 1 to the norms of every checkpoint that lacks this prefix.
    qwen3_5.stack(root.at(source=layout["text"], target="language_model.model"), s, experts)
    tied = f"{layout['text']}.embed_tokens.weight" if qwen3_5.tied(facts) else None
    root.at(source="", target="language_model").head("lm_head", s.vocab, s.hidden, tied_to=tied)
    qwen3_5_moe.drop_mtp(root, facts, s)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    qwen3_5_moe.spell_config(out, facts, tied=qwen3_5.tied(facts))
    return out


MAP = ArchMap(
    model_type="qwen3_5_moe_text",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("fused experts", {"text": "model"}, fused_experts=True),
        Layout("a tensor per expert", {"text": "model"}),
        Layout("cut from the multimodal", {"text": "model.language_model"}, fused_experts=True),
        Layout("cut from the multimodal, a tensor per expert", {"text": "model.language_model"}),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.qwen3_5_moe", "text.moe"),
)
