"""OLMo 2: norms after each half of a layer, query and key norms over all heads."""

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
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    return replace(found, wide_qk_norm=True, norms=norms, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048, eps=("rms_norm_eps", 1e-5))
    out.update(attention_bias=s.attention_bias, mlp_bias=False, rope_traditional=False)
    return out


MAP = ArchMap(
    model_type="olmo2",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
