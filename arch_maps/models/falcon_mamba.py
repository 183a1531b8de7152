"""Falcon Mamba 7B: Mamba with weightless norms on its step, input and output projections."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import mamba


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    mamba.causal_lm(root, facts, tied=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = mamba.spell_config(config, facts, tied=True)
    out.update(use_bcdt_rms=True, mixer_rms_eps=facts.number("mixer_rms_eps", 1e-6))
    return out


MAP = ArchMap(
    model_type="falcon_mamba",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.mamba",),
)
