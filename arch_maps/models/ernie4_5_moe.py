"""ERNIE 4.5 mixtures: the dense models' attention, softmax-routed experts with shared ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
_UNREAD = "the runtimes choose experts without this correction and discard it"


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=4, tied=True)
    biased = facts.flag("use_bias", False)
    return replace(found, attention_bias=biased, mlp_bias=biased)


def _span(facts: Facts, layers: int) -> tuple[int, int, int]:
    """First and last layer that may have experts, and every which of them has."""
    first = facts.data.get("moe_layer_start_index", 1)
    last = facts.data.get("moe_layer_end_index", -1)
    if not isinstance(first, int) or not (last is None or isinstance(last, int)):
        facts.problem(f"config.json: {facts.path}moe_layer_start_index and _end_index are numbers")
        first, last = 0, layers - 1
    last = layers - 1 if last is None or last == -1 else last
    return first, last, int(facts.size("moe_layer_interval", 1))


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    facts.expect("use_bias", False, default=False, why="the reference's experts have no biases")
    s = _sizes(facts)
    first, last, every = _span(facts, s.layers)
    e = moe.Experts(
        count=facts.size("moe_num_experts", 64),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size", 1536),
        fused=layout.fused_experts,
    )
    shared = facts.data.get("moe_num_shared_experts", 2)

    def feed_forward(index: int, layer: Mount) -> None:
        block = layer / "mlp"
        if not (first <= index <= last and (index + 1) % every == 0):
            llama.gated_mlp(block, s.hidden, s.intermediate)
            return
        block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
        block.drop("moe_statics.e_score_correction_bias", _UNREAD, 1, int(e.count))
        moe.experts(block, e)
        if shared:
            width = facts.size("moe_num_shared_experts", 2) * e.intermediate
            llama.gated_mlp(block / "shared_experts", s.hidden, width)

    moe.causal_lm(root, s, feed_forward)
    _drop_mtp(root, facts, s)


def _drop_mtp(root: Mount, facts: Facts, s: llama.Sizes) -> None:
    more = facts.count("num_nextn_predict_layers") if _announced(facts) else 0
    for index in range(more):
        for name in ("mtp_emb_norm", "mtp_hidden_norm"):
            root.drop(f"model.{name}.{index}.weight", _MTP, s.hidden)
        root.drop(f"model.mtp_linear_proj.{index}.weight", _MTP, s.hidden, 2 * s.hidden)

        def block(at: Mount) -> None:
            moe.layer(at, s, lambda layer: llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate))

        moe.drop_block(root, f"model.mtp_block.{index}", block, _MTP)


def _announced(facts: Facts) -> bool:
    return bool(facts.data.get("num_nextn_predict_layers"))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so for this type"
    facts.expect("moe_norm_min", 1e-12, None, default=1e-12, why=why)
    facts.expect("moe_gate_act", "softmax", None, default="softmax", why=why)
    out = spell.start(config)
    s = _sizes(facts)
    first, last, every = _span(facts, s.layers)
    moe.spell_config(out, facts, s, max_positions=131072, eps=1e-5, theta=5e5)
    out.update(
        use_bias=s.attention_bias,
        moe_num_experts=int(facts.size("moe_num_experts", 64)),
        moe_k=int(facts.size("moe_k", 6)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 1536)),
        moe_num_shared_experts=int(facts.data.get("moe_num_shared_experts", 2) or 0),
        moe_layer_start_index=first,
        moe_layer_end_index=last,
        moe_layer_interval=every,
        moe_gate_act="softmax",
    )
    return out


MAP = ArchMap(
    model_type="ernie4_5_moe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {}),
        Layout(
            "fused experts",
            {},
            {"moe_statics.e_score_correction_bias": "gate.moe_statics.e_score_correction_bias"},
            fused_experts=True,
        ),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
