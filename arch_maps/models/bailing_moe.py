"""Ling and Ring (Bailing MoE 1 and 2): attention from one projection, experts and a shared one."""

from __future__ import annotations

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import bailing


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    bailing.causal_lm(root, facts)


MAP = ArchMap(
    model_type="bailing_moe",
    tensors=_tensors,
    config=bailing.spell_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.bailing", "text.moe"),
)
