"""Command R and Aya 23: attention and MLP in parallel, mean-free norms, scaled logits."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import cohere


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    cohere.causal_lm(root, facts, cohere.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    cohere.spell_config(out, facts, cohere.sizes(facts), theta=5e5)
    out["use_qk_norm"] = facts.flag("use_qk_norm", False)
    return out


MAP = ArchMap(
    model_type="cohere",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.cohere",),
)
