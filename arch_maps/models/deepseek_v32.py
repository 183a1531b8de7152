"""DeepSeek V3.2: V3 whose attention looks at the tokens that an indexer chooses."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, dsa, moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    dense = deepseek.dense_first(facts, 3)
    sparse = [index >= dense for index in range(facts.count("num_hidden_layers"))]
    deepseek.latent_lm(
        root,
        facts,
        sparse,
        fused=layout.fused_experts,
        indexer=lambda _, layer: dsa.indexer(layer, facts),
    )


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=163840)
    deepseek.spell_rope(out, facts)
    deepseek.spell_routing(out, facts, dense=deepseek.dense_first(facts, 3))
    deepseek.sigmoid_routing(out, facts)
    dsa.spell_config(out, facts, interleaved=False)
    return out


MAP = ArchMap(
    model_type="deepseek_v32",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.dsa", "text.moe"),
)
