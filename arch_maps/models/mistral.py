"""Mistral 7B and its descendants: Llama's stack without biases."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, llama.sizes(facts, kv_heads=8))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = llama.sizes(facts, kv_heads=8)
    llama.spell_config(out, facts, s, max_positions=4096 * 32)
    window = config.get("sliding_window", 4096)  # the reference's default where the key is absent
    if window is not None:
        # Both runtimes look for at least one full-attention layer and fail on windows alone.
        facts.note(
            f"the release attends to the last {facts.size('sliding_window', 4096)} tokens; the "
            "runtimes attend to all of them, so results agree up to that length only"
        )
    out.update(
        sliding_window=window,
        layer_types=["full_attention"] * s.layers,
        attention_bias=False,
        mlp_bias=False,
        rope_traditional=False,
    )
    return out


MAP = ArchMap(
    model_type="mistral",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
