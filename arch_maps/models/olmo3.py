"""OLMo 3: OLMo 2's layers, three of four with a window and unscaled positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama
from arch_maps.text.windows import FULL, SLIDING, layer_types, rope_by_kind


def _sizes(facts: Facts) -> llama.Sizes:
    found = llama.sizes(facts, qk_norm=True)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    return replace(found, wide_qk_norm=True, norms=norms, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    llama.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    out = spell.start(config)
    s = _sizes(facts)
    kinds = layer_types(facts, s.layers, pattern=4)
    if not {FULL, SLIDING} <= set(kinds):
        facts.problem("config.json: layer_types lacks a kind; the runtimes look for both")
    full, sliding = rope_by_kind(facts, full_theta=5e5, sliding_theta=5e5)
    spell.require_rope_type(facts, full)
    spell.require_rope_type(facts, sliding, allowed=("default",))
    if full["rope_theta"] != sliding["rope_theta"]:
        facts.problem(
            f"config.json: rope_theta is {full['rope_theta']} in full and {sliding['rope_theta']} "
            "in sliding layers; the runtimes have one for both"
        )
    out.update(
        attention_bias=s.attention_bias,
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        sliding_window=int(facts.size("sliding_window", 4096)),
        layer_types=kinds,
        **spell.spell_rope(full),
    )
    out["rope_parameters"] = {FULL: full, SLIDING: sliding}
    return out


MAP = ArchMap(
    model_type="olmo3",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
