"""GLM-4 9B chat and base (the "hf" releases): partially rotated heads, fused MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def sizes(facts: Facts) -> llama.Sizes:
    """The stack's sizes, with the reference's defaults."""
    found = llama.sizes(facts, kv_heads=2, head_dim=128)
    biased = facts.flag("attention_bias", True)
    return replace(found, qkv_bias=biased, attention_bias=False, fused_mlp=True, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = sizes(facts)
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=131072,
        eps=("rms_norm_eps", 1.5625e-07),
        partial=0.5,
        rope_types=("default",),
    )
    out["attention_bias"] = s.qkv_bias
    return out


MAP = ArchMap(
    model_type="glm",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
    remarks=("Both runtimes rotate whole heads where the releases rotate half of each.",),
)
