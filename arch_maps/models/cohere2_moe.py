"""North (Cohere 2 mixtures): attention and experts side by side, positions in the windows only."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, llama, moe, windows


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, head_dim=128, tied=True)


def _kinds(facts: Facts, dense: int) -> list[str]:
    """What each layer attends to; the dense first ones to everything, as in the runtime."""
    layers = facts.count("num_hidden_layers")
    if facts.data.get("layer_types") is not None:
        kinds = windows.layer_types(facts, layers, pattern=4)
    else:
        every = int(facts.size("sliding_window_pattern", 4))
        counted = (index + 1 - dense for index in range(dense, layers))
        kinds = [windows.SLIDING if place % every else windows.FULL for place in counted]
        kinds = [windows.FULL] * dense + kinds
    if windows.SLIDING in kinds[:dense]:
        facts.problem(f"config.json: {facts.path}layer_types has windows in the dense first layers")
    return kinds


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s, dense = _sizes(facts), deepseek.dense_first(facts, 0)
    e = moe.Experts(
        count=moe.expert_count(facts, 8),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
    )
    wide = s.intermediate
    if facts.data.get("prefix_dense_intermediate_size") is not None:
        wide = facts.size("prefix_dense_intermediate_size")
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        block = layer / "mlp"
        if index < dense:
            llama.gated_mlp(block, s.hidden, wide)
        else:
            block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
            moe.experts(block, e)
            if facts.data.get("num_shared_experts"):
                shared = facts.size("num_shared_experts") * s.intermediate
                llama.gated_mlp(block / "shared_experts", s.hidden, shared)
        layer.norm("input_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    facts.expect("tie_word_embeddings", True, None, default=True, why="the runtime ties the head")
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight")


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the reference computes it so"
    for name, needed in (("use_qk_norm", False), ("use_parallel_block", True)):
        facts.expect(name, needed, default=needed, why=why)
    facts.expect("prefix_dense_sliding_window_pattern", 1, default=1, why=why)
    out = spell.start(config)
    s, dense = _sizes(facts), deepseek.dense_first(facts, 0)
    choice = facts.data.get("expert_selection_fn", "softmax")
    if choice == "softmax":  # of the chosen alone, which is the same only when normalised
        facts.expect("norm_topk_prob", True, default=True, why="the runtime divides otherwise")
    moe.spell_config(out, facts, s, max_positions=8192)
    shared = int(facts.data.get("num_shared_experts") or 0)
    norm = facts.data.get("rms_norm_eps")
    moe.spell_expert_count(out, moe.expert_count(facts, 8))
    out.update(
        rms_norm_eps=None if norm is None else facts.number("rms_norm_eps"),
        layer_norm_eps=facts.number("layer_norm_eps", 1e-5),
        layer_norm_bias=False,
        logit_scale=facts.number("logit_scale", 0.0625),
        attention_bias=s.attention_bias,
        layer_types=_kinds(facts, dense),
        first_k_dense_replace=dense,
        prefix_dense_intermediate_size=facts.data.get("prefix_dense_intermediate_size")
        or int(s.intermediate),
        prefix_dense_sliding_window_pattern=1,
        sliding_window=int(facts.size("sliding_window", 4096)),
        sliding_window_pattern=int(facts.size("sliding_window_pattern", 4)),
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 2)),
        num_shared_experts=shared,
        moe_num_shared_experts=shared,
        expert_selection_fn=choice,
        moe_gate_act=choice,
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        shared_expert_combination_strategy=facts.data.get(
            "shared_expert_combination_strategy", "average"
        ),
    )
    return out


MAP = ArchMap(
    model_type="cohere2_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm",),
    parts=("text.llama", "text.moe"),
)
