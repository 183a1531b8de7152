"""ERNIE 4.5 dense text models: Llama's stack with neighbouring dimensions rotated together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, kv_heads=2, head_dim=128, tied=True)
    biased = facts.flag("use_bias", False)
    return replace(found, attention_bias=biased, mlp_bias=biased)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=131072,
        eps=("rms_norm_eps", 1e-5),
        theta=5e5,
        rope_types=("default",),
    )
    out["use_bias"] = s.attention_bias
    return out


MAP = ArchMap(
    model_type="ernie4_5",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
