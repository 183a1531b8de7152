"""GLM-4 0414 and GLM-Z1: GLM with norms after each half of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps.facts import Facts
from arch_maps.models import glm
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
)


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(glm.sizes(facts), norms=_NORMS)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect(
        "tie_word_embeddings", False, default=False, why="the runtimes have a head of its own"
    )
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return glm.MAP.config(config, facts) | {"rope_traditional": True}


MAP = ArchMap(
    model_type="glm4",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
