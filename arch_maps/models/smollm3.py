"""SmolLM3: Llama's stack, every few layers without positions."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=4, tied=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes attend to everything"
    facts.expect("use_sliding_window", False, default=False, why=why)
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=32768, theta=2e6)
    every = int(facts.size("no_rope_layer_interval", 4))
    placed = facts.data.get("no_rope_layers")
    if placed is None:
        placed = [int((index + 1) % every != 0) for index in range(s.layers)]
    if not isinstance(placed, list) or len(placed) != s.layers:
        facts.problem(f"config.json: no_rope_layers must list {s.layers} layers")
    out.update(
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        no_rope_layers=placed,
        no_rope_layer_interval=every,
        layer_types=["full_attention"] * s.layers,
        sliding_window=None,
        rope_traditional=False,
    )
    return out


MAP = ArchMap(
    model_type="smollm3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
