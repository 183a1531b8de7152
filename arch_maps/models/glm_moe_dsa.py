"""GLM 5: latent attention over the tokens that an indexer chooses, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, dsa, moe


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    dense, kinds = deepseek.dense_first(facts, 3), dsa.choosers(facts)
    sparse = [index >= dense for index in range(len(kinds))]

    def indexer(index: int, layer: Mount) -> None:
        if index >= len(kinds) or kinds[index] == "full":
            dsa.indexer(layer, facts)

    deepseek.latent_lm(root, facts, sparse, fused=layout.fused_experts, indexer=indexer)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=202752, eps=1e-5)
    deepseek.spell_rope(out, facts)
    deepseek.spell_routing(out, facts, dense=deepseek.dense_first(facts, 3))
    deepseek.sigmoid_routing(out, facts)
    dsa.spell_config(out, facts, interleaved=True)
    kinds = dsa.choosers(facts)
    if "shared" in kinds:
        facts.note("mlx-lm has an indexer in every layer and cannot load this release; mlx-vlm can")
    out.update(indexer_types=kinds, index_topk_pattern=None)
    return out


MAP = ArchMap(
    model_type="glm_moe_dsa",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.mla", "text.dsa", "text.moe"),
)
