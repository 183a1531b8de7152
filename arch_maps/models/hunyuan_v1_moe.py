"""Hunyuan A13B: the dense models' attention, softmax-routed experts and a shared one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama, moe

_RUNTIME_TYPE = "hunyuan"
_NORMS = ("query_layernorm", "key_layernorm")


def _sizes(facts: Facts) -> llama.Sizes:
    s = llama.sizes(facts, qk_norm=True)
    return replace(s, qk_norms=_NORMS, mlp_bias=False)


def _same(facts: Facts, name: str, default: int) -> Dim:
    """A size that the release may list by layer, where the reference has one for all."""
    value = facts.data.get(name)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    return Facts({name: value}, path=facts.path, parent=facts).size(name, default)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    e = moe.Experts(
        count=_same(facts, "num_experts", 1),
        hidden=s.hidden,
        intermediate=s.intermediate,
        fused=layout.fused_experts,
    )

    def feed_forward(_: int, layer: Mount) -> None:
        block = layer / "mlp"
        block.linear("gate.wg", e.count, s.hidden, kind=Kind.GATE)
        moe.experts(block, e)
        llama.gated_mlp(block / "shared_mlp", s.hidden, s.intermediate)

    facts.expect("tie_word_embeddings", True, default=False, why="the runtimes tie the head")
    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("use_qk_norm", True, default=True, why="the reference always has these norms")
    facts.expect("use_cla", False, default=False, why="no layer of the reference shares its keys")
    facts.expect("use_mixed_mlp_moe", True, default=True, why="the reference has a shared expert")
    out = spell.start(config)
    s = _sizes(facts)
    for name, needed in (
        ("moe_intermediate_size", s.intermediate),
        ("num_shared_expert", Dim(1, "1")),
    ):
        if _same(facts, name, int(needed)) != needed:
            facts.problem(f"config.json: {facts.path}{name} must be {int(needed)} in every layer")
    if _same(facts, "num_experts", 1) == 1:
        facts.problem(f"config.json: {facts.path}num_experts is 1: that is no mixture")
    types = ("dynamic",)
    moe.spell_config(out, facts, s, max_positions=2048, eps=1e-5, rope_types=types)
    scaling = out["rope_scaling"] or {}
    if not scaling.get("alpha"):
        facts.problem("config.json: rope_scaling has no alpha; the runtimes compute no other kind")
    scaling.setdefault("factor", 1.0)
    count = int(_same(facts, "num_experts", 1))
    moe.spell_expert_count(out, count)
    # The runtimes know the architecture by its earlier name only.
    out.update(
        model_type=_RUNTIME_TYPE,
        moe_topk=int(_same(facts, "moe_topk", 1)),
        moe_intermediate_size=int(s.intermediate),
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=False,
        cla_share_factor=2,
        attention_bias=s.attention_bias,
    )
    return out


MAP = ArchMap(
    model_type="hunyuan_v1_moe",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.moe"),
)
