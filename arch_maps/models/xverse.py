"""XVERSE: Llama's model under a name of its own, which mlx-lm knows as Llama."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, llama.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), llama.sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048)
    out.update(attention_bias=s.attention_bias, mlp_bias=s.mlp_bias, rope_traditional=False)
    out["layer_types"] = ["full_attention"] * s.layers
    out["sliding_window"] = None
    return out


MAP = ArchMap(
    model_type="xverse",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-lm",),
    parts=("text.llama",),
)
