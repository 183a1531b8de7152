"""Solar Open: Llama's attention, and DeepSeek's experts in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    # No layer is dense, so that the reference's config need not state a dense MLP's size.
    stated = {"intermediate_size": facts.data.get("moe_intermediate_size"), **facts.data}
    s = llama.sizes(Facts(stated, path=facts.path, parent=facts), kv_heads=8, head_dim=128)
    return replace(s, qkv_bias=s.attention_bias, attention_bias=False)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    e = deepseek.routed(facts, fused=layout.fused_experts)
    moe.causal_lm(root, _sizes(facts), lambda _, layer: deepseek.experts(layer / "mlp", facts, e))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    why = "the reference has experts in every layer and no query and key norms"
    facts.expect("first_k_dense_replace", 0, None, default=0, why=why)
    facts.expect("use_qk_norm", False, default=False, why=why)
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(
        out,
        facts,
        s,
        max_positions=131072,
        eps=1e-5,
        theta=1e6,
        rotary=1.0,
        rope_types=("default", "yarn"),
    )
    moe.note_scaling(out, facts)
    deepseek.spell_routing(out, facts, dense=0)
    deepseek.sigmoid_routing(out, facts)
    out.update(use_qk_norm=False, attention_bias=s.qkv_bias, intermediate_size=int(s.intermediate))
    return out


MAP = ArchMap(
    model_type="solar_open",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
    remarks=("mlx-lm ignores the release's YaRN position scaling; mlx-vlm computes it.",),
)
