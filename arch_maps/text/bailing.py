"""The Bailing stack of Ling and Ring: attention from one projection, experts and a shared one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import deepseek, llama, moe

_NORMS: Final = ("input_layernorm", "post_attention_layernorm")


def _attention(at: Mount, facts: Facts, s: llama.Sizes, *, linear: bool = False) -> None:
    rows = (s.heads + 2 * s.kv_heads) * s.head_dim
    at.linear("query_key_value", rows, s.hidden, bias=facts.flag("use_qkv_bias", False))
    at.linear("dense", s.hidden, s.heads * s.head_dim, bias=facts.flag("use_bias", False))
    if facts.flag("use_qk_norm", False):
        at.norm("query_layernorm", s.head_dim)
        at.norm("key_layernorm", s.head_dim)
    if linear:
        at.linear("g_proj", s.heads * s.head_dim, s.hidden)
        at.norm("g_norm", s.heads * s.head_dim)


def _routed(at: Mount, facts: Facts, e: moe.Experts) -> None:
    router = at.input("gate.weight", e.count, e.hidden)
    at.rule("gate.gate_proj.weight", router, Kind.GATE)
    if facts.flag("moe_router_enable_expert_bias", False):
        at.tensor("gate.expert_bias", e.count, kind=Kind.STATE)
    moe.experts(at, e)
    if _shared(facts):
        width = facts.size("num_shared_experts") * _shared_width(facts)
        llama.gated_mlp(at / "shared_experts", e.hidden, width)


def _shared(facts: Facts) -> bool:
    return bool(facts.data.get("num_shared_experts")) and facts.flag(
        "moe_router_enable_shared_expert", True
    )


def _shared_width(facts: Facts) -> int:
    own = "moe_shared_expert_intermediate_size"
    return facts.size(own if facts.data.get(own) else "moe_intermediate_size")


def causal_lm(root: Mount, facts: Facts, linear: Sequence[bool] = ()) -> None:
    """A release; ``linear`` says which layers have linear attention, where any has."""
    facts.expect("use_bias", False, default=False, why="no release has such biases")
    s, dense = llama.sizes(facts), deepseek.dense_first(facts, 0)
    e = moe.Experts(
        count=facts.size("num_experts"),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size"),
        fused=False,
    )

    def attention(index: int, layer: Mount) -> None:
        if linear and index < s.layers and linear[index]:
            every = replace(s, kv_heads=s.heads)
            _attention(layer / "attention", facts, every, linear=True)
        else:
            _attention(layer / "attention", facts, s)

    def routed(layer: Mount, index: int = s.layers) -> None:
        attention(index, layer)
        _routed(layer / "mlp", facts, e)
        for name in _NORMS:
            layer.norm(name, s.hidden)

    model = root / "model"
    model.embedding("word_embeddings", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        if index >= dense:
            routed(layer, index)
            continue
        attention(index, layer)
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        for name in _NORMS:
            layer.norm(name, s.hidden)
    model.norm("norm", s.hidden)
    table = "model.word_embeddings.weight" if s.tied else None
    root.head("lm_head", s.vocab, s.hidden, tied_to=table)
    _drop_mtp(root, facts, s, routed)


def _drop_mtp(root: Mount, facts: Facts, s: llama.Sizes, routed: moe.Block) -> None:
    def block(at: Mount) -> None:
        routed(at)
        at.linear("eh_proj", s.hidden, 2 * s.hidden)
        for name in ("enorm", "hnorm", "final_layernorm"):
            at.norm(name, s.hidden)

    more = facts.count("num_nextn_predict_layers") if deepseek.mtp_layers(facts) else 0
    for index in range(s.layers, s.layers + more):
        moe.drop_block(root, f"model.layers.{index}", block, deepseek.MTP)
        (root / f"model.layers.{index}").bind_drops("eh_proj.weight")


def spell_config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """The config that the runtimes read."""
    why = "the runtimes normalise packed codes as if they were weights when they load"
    facts.expect("norm_head", False, default=False, why=why)
    facts.expect("norm_softmax", False, default=False, why="the runtimes do not compute it")
    why = "the runtimes divide the hidden size among the heads"
    out, s = spell.start(config), llama.sizes(facts)
    facts.expect("head_dim", int(s.hidden) // int(s.heads), None, default=None, why=why)
    moe.spell_config(
        out, facts, s, max_positions=16384, rotary=1.0, rope_types=("default", "linear", "yarn")
    )
    out.update(
        num_experts=int(facts.size("num_experts")),
        num_experts_per_tok=int(facts.size("num_experts_per_tok")),
        num_shared_experts=int(facts.data.get("num_shared_experts") or 0),
        moe_intermediate_size=int(facts.size("moe_intermediate_size")),
        moe_shared_expert_intermediate_size=int(_shared_width(facts)),
        moe_router_enable_shared_expert=_shared(facts),
        moe_router_enable_expert_bias=facts.flag("moe_router_enable_expert_bias", False),
        moe_router_enable_routed_scaling=True,
        routed_scaling_factor=facts.number("routed_scaling_factor", 1.0),
        score_function=facts.data.get("score_function") or "softmax",
        norm_topk_prob=facts.flag("norm_topk_prob", True),
        n_group=int(facts.size("n_group", 1)),
        topk_group=int(facts.size("topk_group", 1)),
        first_k_dense_replace=deepseek.dense_first(facts, 0),
        use_bias=False,
        use_qkv_bias=facts.flag("use_qkv_bias", False),
        use_qk_norm=facts.flag("use_qk_norm", False),
        norm_head=False,
        norm_softmax=False,
        rotary_dim=int(int(s.head_dim) * out["partial_rotary_factor"]),
    )
    return out
