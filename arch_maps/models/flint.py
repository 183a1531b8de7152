"""Flint: attention sinks everywhere, positions in the windows only, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Constant
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe, windows


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=4, head_dim=128, qk_norm=True)


def _kinds(facts: Facts) -> list[str]:
    """What each layer attends to; the reference has its own pattern where none is listed."""
    layers = facts.count("num_hidden_layers")
    if facts.data.get("layer_types") is not None:
        return windows.layer_types(facts, layers, pattern=4)
    full = {0, layers - 1, *range(1, layers, 4)}
    return [windows.FULL if index in full else windows.SLIDING for index in range(layers)]


def _dense(facts: Facts) -> list[int]:
    listed = facts.data.get("mlp_only_layers")
    return [0, 1] if listed is None else list(listed)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    e = moe.Experts(
        count=moe.expert_count(facts, 256),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 512),
        fused=layout.fused_experts,
    )
    shared, dense = facts.size("shared_expert_intermediate_size", 1024), _dense(facts)

    def feed_forward(index: int, layer: Mount) -> None:
        layer.tensor("self_attn.softmax_offset", s.heads, kind=Kind.STATE)
        if index in dense:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
            return
        block = layer / "mlp"
        block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
        # The runtime has room for a correction of the choice, which no release has.
        block.rule("expert_bias", Constant((e.count,), 0.0), Kind.STATE)
        moe.experts(block, e)
        llama.gated_mlp(block / "shared_expert", s.hidden, shared)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtime computes it so for this type"
    facts.expect("norm_topk_prob", True, default=True, why=why)
    facts.expect("decoder_sparse_step", 1, default=1, why=why)
    facts.expect("router_score_function", "sigmoid", default="sigmoid", why=why)
    facts.expect("softmax_type", "learnable", default="learnable", why=why)
    out = spell.start(config)
    s, kinds = _sizes(facts), _kinds(facts)
    types = ("default", "linear", "yarn", "llama3")
    moe.spell_config(out, facts, s, max_positions=262144, rope_types=types)
    moe.spell_expert_count(out, moe.expert_count(facts, 256))
    out.update(
        layer_types=kinds,
        no_rope_layer_indices=[i for i, kind in enumerate(kinds) if kind == windows.FULL],
        use_sliding_window=True,
        sliding_window=int(facts.size("sliding_window", 513)),
        softmax_type="learnable",
        router_score_function="sigmoid",
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=_dense(facts),
        attention_bias=s.attention_bias,
        hidden_act="silu",
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 6)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=int(facts.size("shared_expert_intermediate_size", 1024)),
    )
    return out


MAP = ArchMap(
    model_type="flint",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {}),
        Layout("fused experts", {}, {"self_attn.softmax_offset": "self_attn.sinks"}, True),
    ),
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe"),
)
