"""dots.llm1: Qwen3's attention and DeepSeek's experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, llama, moe


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    e = deepseek.routed(facts, fused=layout.fused_experts)
    sparse = moe.dense_prefix(facts, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            deepseek.experts(layer / "mlp", facts, e, target="experts")
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    moe.spell_config(out, facts, s, max_positions=2048)
    deepseek.spell_routing(
        out, facts, dense=facts.data.get("first_k_dense_replace") or 0, normalised=False
    )
    kinds = facts.data.get("layer_types") or []
    windowed = "sliding_attention" in kinds
    if not kinds and facts.data.get("sliding_window", 4096) is not None:
        windowed = facts.data.get("max_window_layers", 62) < s.layers
    if windowed:
        facts.problem(f"config.json: {facts.path}layer_types has windows; the runtimes have none")
    out.update(attention_bias=False, mlp_bias=False, scoring_func="noaux_tc")
    return out


MAP = ArchMap(
    model_type="dots1",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
)
