"""Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE: biases, layer norms, experts by sparsemixer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_BLOCK = "block_sparse_moe"
_MSCALES = ("short_mscale", "long_mscale")


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(llama.sizes(facts, kv_heads=8), norm_bias=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    for name in ("attention_bias", "lm_head_bias"):
        facts.expect(name, True, default=False, why="the runtimes always have these biases")
    s = _sizes(facts)
    routed = moe.Experts(
        count=moe.expert_count(facts, 16),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
        names=("w1", "w3", "w2"),
    )

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer.at(source=layout["experts"], target=_BLOCK)
        block.linear("gate", routed.count, s.hidden, kind=Kind.GATE)
        moe.experts(block, routed)

    moe.causal_lm(root, s, feed_forward)
    root.tensor("lm_head.bias", s.vocab, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    why = "the runtimes divide the hidden size among the heads"
    s = _sizes(facts)
    facts.expect("head_dim", int(s.hidden) // int(s.heads), None, default=None, why=why)
    facts.expect("num_experts_per_tok", 2, default=2, why="the reference chooses two")
    out = spell.start(config)
    moe.spell_config(
        out,
        facts,
        s,
        max_positions=4096 * 32,
        eps=1e-5,
        theta=1e6,
        rope_types=("default", "longrope"),
    )
    settings, longest = out["rope_parameters"], out["max_position_embeddings"]
    trained = settings.get("original_max_position_embeddings") or longest
    if settings["rope_type"] == "longrope":
        for name in _MSCALES:
            if not isinstance(settings.get(name), int | float):
                facts.problem(f"config.json: {facts.path}rope_scaling.{name} must be a number")
        facts.note(
            f"transformers 5 takes the short factors beyond {trained} tokens too, the runtimes the "
            "long ones, as the release does"
        )
    window = facts.data.get("sliding_window")
    if isinstance(window, int) and window < longest:
        facts.note(
            f"the release attends to the last {window} tokens; the runtimes attend to all of "
            "them, so results agree up to that length only"
        )
    moe.spell_expert_count(out, moe.expert_count(facts, 16))
    out.update(
        num_experts_per_tok=2,
        router_jitter_noise=facts.number("router_jitter_noise", 0.01),
        original_max_position_embeddings=trained,
        attention_bias=True,
        lm_head_bias=True,
    )
    return out


MAP = ArchMap(
    model_type="phimoe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"experts": _BLOCK}),
        Layout("fused experts", {"experts": "mlp"}, {"gate.weight": "router.weight"}, True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
    remarks=("mlx-lm applies LongRoPE's long factors at every length.",),
)
