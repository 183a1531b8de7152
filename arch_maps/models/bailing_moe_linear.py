"""Ring and Ling linear 2.0: Bailing's stack, linear attention in all but one layer of a group."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bailing


def _linear(facts: Facts) -> list[bool]:
    """Which layers have linear attention: those of a whole group but its last."""
    layers, group = facts.count("num_hidden_layers"), int(facts.size("layer_group_size"))
    whole = layers // group * group
    return [(index + 1) % group != 0 and index < whole for index in range(layers)]


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    bailing.causal_lm(root, facts, _linear(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("use_rmsnorm", True, default=True, why="the runtimes have no other norm")
    groups, heads = int(facts.size("group_norm_size")), int(facts.size("num_attention_heads"))
    if heads % groups:
        facts.problem(f"config.json: {facts.path}group_norm_size must divide the {heads} heads")
    out = bailing.spell_config(config, facts)
    out.update(
        layer_group_size=int(facts.size("layer_group_size")),
        group_norm_size=groups,
        rope_traditional=facts.flag("rope_traditional", False),
        use_rmsnorm=True,
    )
    return out


MAP = ArchMap(
    model_type="bailing_moe_linear",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.bailing", "text.moe"),
)
