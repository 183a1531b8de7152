"""The Qwen3.5 text stack with routed experts and a gated shared one in every layer."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Mount
from arch_maps.text import moe, qwen3_5

_SHARED: Final = "shared_expert_intermediate_size"


def sizes(facts: Facts) -> qwen3_5.Sizes:
    """Read the sizes; the shared expert's stands for the MLP's."""
    return qwen3_5.sizes(facts, intermediate=_SHARED)


def feed_forward(facts: Facts, *, fused: bool) -> qwen3_5.FeedForward:
    """What adds the experts of one layer."""
    routed = moe.Experts(
        count=moe.expert_count(facts, 256),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size("moe_intermediate_size", 512),
        fused=fused,
    )

    def add(layer: Mount, s: qwen3_5.Sizes) -> None:
        moe.gated_shared(layer / "mlp", routed, s.intermediate)

    return add


def drop_mtp(root: Mount, facts: Facts, s: qwen3_5.Sizes) -> None:
    """Leave out the drafter's layers, however their experts are held."""
    if facts.data.get("mtp_num_hidden_layers"):
        for fused in (True, False):
            experts = feed_forward(facts, fused=fused)
            qwen3_5.drop_mtp(root, s, facts.count("mtp_num_hidden_layers"), experts)
        root.out.drops[:] = {drop.name: drop for drop in root.out.drops}.values()


def spell_config(config: dict[str, Any], facts: Facts, *, tied: bool) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    qwen3_5.spell_config(config, facts, tied=tied, intermediate=_SHARED)
    why = "the reference always normalises the routing weights of this type"
    facts.expect("norm_topk_prob", True, default=True, why=why)
    shared = int(facts.size(_SHARED))
    moe.spell_expert_count(config, moe.expert_count(facts, 256))
    config.update(
        num_experts_per_tok=int(facts.size("num_experts_per_tok", 8)),
        moe_intermediate_size=int(facts.size("moe_intermediate_size", 512)),
        shared_expert_intermediate_size=shared,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    config.setdefault("intermediate_size", shared)
