"""EXAONE 4: norms after each half of a layer; positions only in the layers with a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.text.windows import FULL, SLIDING, layer_types


def _sizes(facts: Facts) -> llama.Sizes:
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    found = llama.sizes(facts, kv_heads=32, qk_norm=True)
    return replace(found, norms=norms, attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048, eps=("rms_norm_eps", 1e-5))
    window = config.get("sliding_window", 4096)
    stated = config.get("sliding_window_pattern", 4)
    every = stated if isinstance(stated, int) and stated else 4
    kinds = layer_types(facts, s.layers, pattern=s.layers + 1 if window is None else every)
    if window is None:
        kinds = [FULL] * s.layers
    elif not {FULL, SLIDING} <= set(kinds):
        facts.problem("config.json: layer_types lacks a kind; the runtimes look for both")
    letters = "".join("L" if kind == SLIDING else "G" for kind in kinds)
    out.update(
        layer_types=kinds,
        sliding_window=window,
        sliding_window_pattern=None if window is None else letters,
    )
    return out


MAP = ArchMap(
    model_type="exaone4",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
