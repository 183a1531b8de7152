"""Nanbeige: Llama's stack, run several times over the same residual stream."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama

_UNSUPPORTED = ("enable_double_loop_split", "loop_share_kv", "enable_depth_attention")


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, llama.sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    for name in _UNSUPPORTED:
        facts.expect(name, False, None, default=False, why="the runtime does not compute it")
    out, s = spell.start(config), llama.sizes(facts)
    llama.spell_config(out, facts, s, max_positions=32768)
    out.update(
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        num_loops=int(facts.size("num_loops", 1)),
        loop_loss_weights=facts.data.get("loop_loss_weights"),
        skip_loop_final_norm=facts.flag("skip_loop_final_norm", False),
        **dict.fromkeys(_UNSUPPORTED, False),
    )
    return out


MAP = ArchMap(
    model_type="nanbeige",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-lm",),
    parts=("text.llama",),
)
