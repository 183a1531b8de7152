"""Trinity (AFMoE): gated attention, four norms a layer, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, head_dim=128, qk_norm=True)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    sparse = moe.dense_prefix(facts, s.layers, name="num_dense_layers")
    e = moe.Experts(
        count=moe.expert_count(facts, 64),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 1408),
        fused=layout.fused_experts,
    )
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        layer.linear("self_attn.gate_proj", s.heads * s.head_dim, s.hidden)
        block = layer / "mlp"
        if sparse[index]:
            block.linear("router.gate", e.count, s.hidden, kind=Kind.GATE)
            block.tensor("expert_bias", e.count, kind=Kind.STATE)
            moe.experts(block, e, target="experts")
            if facts.data.get("num_shared_experts", 2):
                shared = facts.size("num_shared_experts", 2) * e.intermediate
                llama.gated_mlp(block / "shared_experts", s.hidden, shared)
        else:
            llama.gated_mlp(block, s.hidden, s.intermediate)
        for name in _NORMS:
            layer.norm(name, s.hidden)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the reference routes by normalised sigmoids over all experts"
    facts.expect("score_func", "sigmoid", default="sigmoid", why=why)
    facts.expect("route_norm", True, default=True, why=why)
    facts.expect("n_group", 1, None, default=1, why=why)
    out = spell.start(config)
    s = _sizes(facts)
    every = int(facts.size("global_attn_every_n_layers", 4))
    kinds = facts.data.get("layer_types") or [
        "sliding_attention" if (index + 1) % every else "full_attention"
        for index in range(s.layers)
    ]
    if len(kinds) != s.layers or "full_attention" not in kinds:
        facts.problem(
            f"config.json: {facts.path}layer_types must list {s.layers} layers, one of them "
            "full_attention"
        )
    types = ("default", "linear", "yarn", "llama3")
    moe.spell_config(out, facts, s, max_positions=16384, eps=1e-5, rope_types=types)
    moe.spell_expert_count(out, moe.expert_count(facts, 64))
    out.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 6)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 1408)),
        num_shared_experts=facts.data.get("num_shared_experts", 2),
        num_dense_layers=facts.data.get("num_dense_layers", 1),
        layer_types=list(kinds),
        sliding_window=int(facts.size("sliding_window", 1024)),
        mup_enabled=facts.flag("mup_enabled", False),
        route_scale=facts.number("route_scale", 1.0),
        route_norm=True,
        score_func="sigmoid",
        n_group=1,
        topk_group=1,
    )
    return out


MAP = ArchMap(
    model_type="afmoe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
