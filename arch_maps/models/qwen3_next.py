"""Qwen3-Next: gated delta nets, gated attention, routed experts and a shared one."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import moe, qwen3_5, qwen3_next


def _sizes(facts: Facts) -> qwen3_5.Sizes:
    return qwen3_5.sizes(facts)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    qwen3_next.stack(root / "model", facts, s, fused=layout.fused_experts)
    tied = facts.flag("tie_word_embeddings", False)
    table = "model.embed_tokens.weight" if tied else None
    root.head("lm_head", s.vocab, s.hidden, tied_to=table)
    qwen3_next.drop_mtp(root, facts, s)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    tied = facts.flag("tie_word_embeddings", False)
    qwen3_5.spell_config(out, facts, tied=tied)
    # Plain positions, unlike Qwen3.5's three axes.
    settings = spell.rope(facts)
    settings.setdefault("partial_rotary_factor", 0.25)
    moe.require_rope(facts, settings, ("default", "yarn"))
    out.update(spell.spell_rope(settings))
    moe.spell_expert_count(out, moe.expert_count(facts, 512))
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 10)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 512)),
        decoder_sparse_step=int(facts.size("decoder_sparse_step", 1)),
        mlp_only_layers=facts.data.get("mlp_only_layers") or [],
        norm_topk_prob=facts.flag("norm_topk_prob", True),
    )
    return out


MAP = ArchMap(
    model_type="qwen3_next",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.qwen3_next", "text.moe"),
)
