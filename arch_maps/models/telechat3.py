"""TeleChat 3: Llama's stack under a name of its own."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama

_YARN = "telechat3-yarn"
"""A YaRN that both runtimes know by the release's name for it."""


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, llama.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), llama.sizes(facts)
    types = (*spell.NATIVE_ROPE_TYPES, _YARN)
    llama.spell_config(out, facts, s, max_positions=32768, rope_types=types)
    out.update(attention_bias=s.attention_bias, mlp_bias=s.mlp_bias)
    return out


MAP = ArchMap(
    model_type="telechat3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
