"""GLM 4.5, 4.6 and 4.7: partial rotary attention and DeepSeek's experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    qk_norm = facts.flag("use_qk_norm", False)
    return llama.sizes(facts, kv_heads=8, qk_norm=qk_norm)


def _attention(at: Mount, s: llama.Sizes) -> None:
    llama.attention(at, replace(s, qkv_bias=s.attention_bias, attention_bias=False))


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    e = deepseek.routed(facts, fused=layout.fused_experts)
    sparse = moe.dense_prefix(facts, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            deepseek.experts(layer / "mlp", facts, e)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    def block(layer: Mount) -> None:
        moe.layer(layer, s, lambda at: deepseek.experts(at / "mlp", facts, e), _attention)

    moe.causal_lm(root, s, feed_forward, attention=_attention)
    deepseek.drop_mtp(root, facts, s.layers, block)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(out, facts, s, max_positions=131072, eps=1e-5, rotary=0.5)
    deepseek.spell_routing(out, facts, dense=facts.data.get("first_k_dense_replace") or 0)
    deepseek.sigmoid_routing(out, facts)
    out.update(use_qk_norm=s.qk_norm, attention_bias=s.attention_bias)
    return out


MAP = ArchMap(
    model_type="glm4_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
)
