"""IQuest-Coder: Llama's model under a name of its own, which the runtimes know as Llama."""

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
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes clip nothing"
    facts.expect("clip_qkv", None, default=None, why=why)
    why = "the runtimes attend to everything"
    facts.expect("use_sliding_window", False, None, default=False, why=why)
    out, s = spell.start(config), _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=131072, eps=("rms_norm_eps", 1e-5))
    out.update(attention_bias=s.attention_bias, mlp_bias=s.mlp_bias, rope_traditional=False)
    out["layer_types"] = ["full_attention"] * s.layers
    out["sliding_window"] = None
    return out


MAP = ArchMap(
    model_type="iquestcoder",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
