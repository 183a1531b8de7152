"""Nemotron Super, Ultra and 51B: Llama's layers with a size of their own each, some left out."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import llama, nemotron_nas


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    nemotron_nas.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    llama.expect_silu(facts)
    out, s = spell.start(config), nemotron_nas.sizes(facts)
    rope = spell.rope(facts, default_theta=5e5)
    spell.require_rope_type(facts, rope)
    blocks = nemotron_nas.blocks(facts, s.layers)
    if blocks and all(attention.size is None for attention, _mlp in blocks):
        facts.problem("config.json: block_configs has no attention; the runtimes look for one")
    out.update(
        block_configs=[_spelled(attention, mlp) for attention, mlp in blocks],
        hidden_act="silu",
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        **spell.spell_rope(rope),
    )
    return out


def _spelled(attention: nemotron_nas.Half, mlp: nemotron_nas.Half) -> dict[str, Any]:
    """A layer's entry with the keys that the runtimes take; they refuse others."""

    def one(half: nemotron_nas.Half, size: str) -> dict[str, Any]:
        return {
            "no_op": half.size is None,
            "replace_with_linear": half.linear,
            size: (int(half.size) if half.size.is_integer() else half.size) if half.size else None,
        }

    return {"attention": one(attention, "n_heads_in_group"), "ffn": one(mlp, "ffn_mult")}


MAP = ArchMap(
    model_type="nemotron-nas",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.nemotron_nas", "text.llama"),
    remarks=(
        "transformers 5.23.0 cannot read the config of this type where positions are scaled, so "
        "that no tokenizer loads beside it.",
    ),
)
