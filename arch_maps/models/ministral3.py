"""Ministral 3 and Devstral 2 text models: Llama's stack, queries scaled by their position."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=8, head_dim=128)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    for name in ("attention_bias", "mlp_bias"):
        facts.expect(name, False, default=False, why="neither side has such biases")
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("sliding_window", None, default=None, why="no release has a window")
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        facts.problem("config.json does not state rope_parameters")
        return config
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=262144, eps=("rms_norm_eps", 1e-5))
    settings = out["rope_parameters"]
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if settings.get(name) is None:
            facts.problem(f"config.json does not state rope_parameters.{name}")
    out.update(layer_types=["full_attention"] * s.layers, sliding_window=None)
    return out


MAP = ArchMap(
    model_type="ministral3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
