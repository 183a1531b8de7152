"""Gemma 3 text models: per-head norms, windows with positions of their own."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import gemma, llama
from arch_maps.text.windows import interval, layer_types, rope_by_kind


def _sizes(facts: Facts) -> llama.Sizes:
    return gemma.sizes(facts, kv_heads=4, sandwich=True, qk_norm=True)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s = _sizes(facts)
    gemma.causal_lm(root, facts, s)
    # mlx-vlm has a head of its own and fills it with the table, codes without their scales.
    table = root.input("model.embed_tokens.weight", s.vocab, s.hidden)
    root.rule("lm_head.weight", table, Kind.HEAD)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    gemma.expect_tanh_gelu(facts)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        facts.expect(name, None, default=None, why="the runtimes do not cap these logits")
    out = spell.start(config)
    s = _sizes(facts)
    full, sliding = rope_by_kind(facts, full_theta=1e6, sliding_theta=1e4)
    spell.require_rope_type(facts, full)
    spell.require_rope_type(facts, sliding, allowed=("default",))
    gemma.spell_config(out, facts, s, full)
    every = int(facts.size("sliding_window_pattern", 6))
    kinds = layer_types(facts, s.layers, pattern=every)
    out.update(
        layer_types=kinds,
        sliding_window=int(facts.size("sliding_window", 4096)),
        sliding_window_pattern=interval(facts, kinds),
        rope_global_base_freq=full["rope_theta"],
        rope_local_base_freq=sliding["rope_theta"],
        query_pre_attn_scalar=facts.number("query_pre_attn_scalar", 256),
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        rope_parameters={"full_attention": full, "sliding_attention": sliding},
    )
    return out


MAP = ArchMap(
    model_type="gemma3_text",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.gemma",),
    remarks=(
        "The tied table is stored a second time as the head, which mlx-vlm expects in the files.",
        "Both runtimes round the embedding scale to bfloat16 in every precision.",
    ),
)
