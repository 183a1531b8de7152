"""Mamba: selective state spaces alone, no attention."""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import mamba


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    mamba.causal_lm(root, facts, tied=True)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return mamba.spell_config(config, facts, tied=True)


MAP = ArchMap(
    model_type="mamba",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("transformers", {}),
        Layout("state-spaces", {}, {"embeddings.weight": "embedding.weight"}),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.mamba",),
)
