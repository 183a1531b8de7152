"""gpt-oss: attention with sinks and windows in turn, and experts with biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute, Reshape, Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_RUNTIME = "the runtimes compute it so"


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(llama.sizes(facts, kv_heads=8, head_dim=64), attention_bias=True)


def _attention(at: Mount, s: llama.Sizes) -> None:
    llama.attention(at, s)
    at.tensor("sinks", s.heads, kind=Kind.BIAS)


def _experts(at: Mount, count: int, hidden: int, inner: int) -> None:
    """Gate and up alternate along the last axis, and matrices are [in, out]."""
    pairs = Reshape(at.input("gate_up_proj", count, hidden, 2 * inner), (count, hidden, inner, 2))
    biases = Reshape(at.input("gate_up_proj_bias", count, 2 * inner), (count, inner, 2))
    for place, name in enumerate(("gate_proj", "up_proj")):
        weight = Reshape(Slice(pairs, 3, place, place + 1), (count, hidden, inner))
        at.rule(f"{name}.weight", Permute(weight, (0, 2, 1)), Kind.LINEAR)
        bias = Reshape(Slice(biases, 2, place, place + 1), (count, inner))
        at.rule(f"{name}.bias", bias, Kind.BIAS)
    down = at.input("down_proj", count, inner, hidden)
    at.rule("down_proj.weight", Permute(down, (0, 2, 1)), Kind.LINEAR)
    at.rule("down_proj.bias", at.input("down_proj_bias", count, hidden), Kind.BIAS)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts)
    count = moe.expert_count(facts, 128)

    def feed_forward(_: int, layer: Mount) -> None:
        layer.linear("mlp.router", count, s.hidden, bias=True, kind=Kind.GATE)
        _experts(layer / "mlp.experts", count, s.hidden, s.intermediate)

    moe.causal_lm(root, s, feed_forward, attention=_attention)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    facts.expect("attention_bias", True, default=True, why=_RUNTIME)
    facts.expect("swiglu_alpha", 1.702, default=1.702, why=_RUNTIME)
    facts.expect("swiglu_limit", 7.0, default=7.0, why=_RUNTIME)
    out = spell.start(config)
    s = _sizes(facts)
    kinds = facts.data.get("layer_types") or [
        "full_attention" if index % 2 else "sliding_attention" for index in range(s.layers)
    ]
    if {"full_attention", "sliding_attention"} != set(kinds) or len(kinds) != s.layers:
        facts.problem(f"config.json: {facts.path}layer_types must name both kinds, once per layer")
    moe.spell_config(
        out,
        facts,
        s,
        max_positions=131072,
        eps=1e-5,
        theta=150000.0,
        rope_types=("default", "yarn"),
        unread=moe.YARN_UNREAD - {"truncate"},
    )
    moe.spell_expert_count(out, moe.expert_count(facts, 128))
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 4)),
        sliding_window=int(facts.size("sliding_window", 128)),
        layer_types=list(kinds),
        attention_bias=True,
    )
    return out


MAP = ArchMap(
    model_type="gpt_oss",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
    remarks=(
        "Both runtimes round the bounds of YaRN's ramp, though the releases say truncate: false; "
        "their rotary frequencies differ slightly from the reference's.",
    ),
)
