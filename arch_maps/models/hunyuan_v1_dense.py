"""HunYuan V1 dense text models: per-head norms after the rotation, NTK-stretched positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, qk_norm=True)
    return replace(found, qk_norms=("query_layernorm", "key_layernorm"), mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("use_qk_norm", True, default=True, why="the reference always has these norms")
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(
        out,
        facts,
        s,
        max_positions=2048,
        eps=("rms_norm_eps", 1e-5),
        rope_types=("default", "dynamic"),
    )
    scaling = out["rope_scaling"]
    if scaling is not None and not scaling.get("alpha"):
        facts.problem("config.json: rope_scaling has no alpha; the runtimes compute no other kind")
    elif scaling is not None:
        scaling.setdefault("factor", 1.0)
    out.update(attention_bias=s.attention_bias, mlp_bias=False, use_qk_norm=True)
    return out


MAP = ArchMap(
    model_type="hunyuan_v1_dense",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
