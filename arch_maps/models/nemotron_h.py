"""Nemotron-H and Nemotron 3: Mamba-2, attention, MLP and expert layers in a written order."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import nemotron_h


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    nemotron_h.causal_lm(root, facts, model=layout["model"], fused=layout.fused_experts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    nemotron_h.spell_config(out, facts)
    return out


MAP = ArchMap(
    model_type="nemotron_h",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"model": "backbone"}),
        Layout("fused experts", {"model": "model"}, fused_experts=True),
        Layout("dense, as transformers holds it", {"model": "model"}),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.nemotron_h", "text.mamba2", "text.llama", "text.moe"),
    remarks=(
        "The reference bounds step sizes from below by time_step_min in a prompt but not in single "
        "steps; the checkpoint has the release's own time_step_limit, which bounds neither.",
    ),
)
