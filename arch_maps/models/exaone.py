"""EXAONE 3.0, 3.5 and Deep, whose releases bring their own model code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import exaone, llama


def _sizes(facts: Facts) -> llama.Sizes:
    named = Facts(
        {"num_hidden_layers": facts.data.get("num_layers"), **facts.data},
        path=facts.path,
        parent=facts,
    )
    return replace(llama.sizes(named, tied=True), attention_bias=False, mlp_bias=False)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    exaone.causal_lm(root, _sizes(facts))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute SiLU whatever it says"
    facts.expect("activation_function", "silu", default="silu", why=why)
    s = _sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope)
    out = spell.start(config)
    out.update(
        num_layers=s.layers,
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        layer_norm_epsilon=facts.number("layer_norm_epsilon", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        attention_bias=False,
        mlp_bias=False,
        rope_traditional=False,
        tie_word_embeddings=s.tied,
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="exaone",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.exaone",),
    remarks=(
        "transformers 5.23.0 cannot read the config of this type where positions are scaled (3.5), "
        "so that no tokenizer loads beside it.",
    ),
)
