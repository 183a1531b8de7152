"""IQuest-Coder Loop: Llama's stack run twice, the second time partly over its own window."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=8, head_dim=128)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts)
    llama.causal_lm(root, s)
    for _index, gate in (root / "model").layers("gate_projections", s.layers):
        gate.tensor("weight", s.heads, s.head_dim, kind=Kind.GATE)
        gate.tensor("bias", s.heads, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    facts.expect("loop_num", 2, default=2, why="the runtimes run the stack twice")
    out, s = spell.start(config), _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=131072, theta=5e5)
    out.update(
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        loop_num=2,
        loop_window_size=int(facts.size("loop_window_size", 64)),
    )
    return out


MAP = ArchMap(
    model_type="iquestloopcoder",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
