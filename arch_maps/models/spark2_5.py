"""Spark 2.5: windows in three of four layers, positions by layer kind, gated heads."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, spark
from arch_maps.text.windows import FULL, SLIDING, layer_types, rope_by_kind


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, tied=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    spark.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute it so whatever it says"
    facts.expect("hidden_act", "gelu", default="gelu", why=why)
    facts.expect("gate_attn_act_mode", "sigmoid", default="sigmoid", why=why)
    facts.expect("headwise_attn_output_gate", True, default=True, why=why)
    out, s = spell.start(config), _sizes(facts)
    kinds = layer_types(facts, s.layers, pattern=4)
    full, sliding = rope_by_kind(facts, full_theta=1e4, sliding_theta=1e4)
    for settings in (full, sliding):
        spell.require_rope_type(facts, settings, allowed=("default",))
        settings.setdefault("partial_rotary_factor", 1.0)
    out.update(
        layer_types=kinds,
        rope_parameters={FULL: full, SLIDING: sliding},
        sliding_window=int(facts.size("sliding_window")),
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 8192)),
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        hidden_act="gelu",
        gate_attn_act_mode="sigmoid",
        headwise_attn_output_gate=True,
        tie_word_embeddings=s.tied,
    )
    return out


MAP = ArchMap(
    model_type="spark2_5",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.spark",),
)
