"""DeepSeek MoE 16B: Llama's attention, softmax-routed experts with shared ones."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, llama, moe


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, e = llama.sizes(facts), deepseek.routed(facts, fused=False)
    dense = deepseek.dense_first(facts, 0)

    def feed_forward(index: int, layer: Mount) -> None:
        if index < dense:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        else:
            deepseek.experts(layer / "mlp", facts, e, correction=False)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    moe.untied(facts)
    why = "the runtimes route by a softmax and do not normalise"
    facts.expect("scoring_func", "softmax", default="softmax", why=why)
    facts.expect("norm_topk_prob", False, default=False, why=why)
    facts.expect("moe_layer_freq", 1, default=1, why="every release has experts in each layer")
    out, s = spell.start(config), llama.sizes(facts)
    moe.spell_config(out, facts, s, max_positions=2048, rope_types=("default", "linear"))
    deepseek.spell_routing(out, facts, dense=deepseek.dense_first(facts, 0), normalised=False)
    out.update(attention_bias=s.attention_bias, scoring_func="softmax")
    return out


MAP = ArchMap(
    model_type="deepseek",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
)
