"""Qwen 1 (7B, 14B, 72B and 1.8B), whose releases bring their own model code."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import qwen1


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    qwen1.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes have a head of its own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    why = "the runtimes fix it in code"
    facts.expect("rotary_emb_base", 10000, default=10000, why=why)
    facts.expect("rotary_pct", 1.0, default=1.0, why=why)
    heads, width = int(facts.size("num_attention_heads")), int(facts.size("kv_channels", 128))
    if heads * width != int(facts.size("hidden_size")):
        facts.problem("config.json: kv_channels must be hidden_size / num_attention_heads here")
    if facts.flag("use_dynamic_ntk", False) or facts.flag("use_logn_attn", False):
        trained = int(facts.size("seq_length", 2048))
        facts.note(
            f"past {trained} tokens the release scales positions and attention; the runtimes do not"
        )
    out = spell.start(config)
    out.update(
        kv_channels=width,
        layer_norm_epsilon=facts.number("layer_norm_epsilon", 1e-6),
        max_position_embeddings=int(facts.size("max_position_embeddings", 8192)),
        no_bias=facts.flag("no_bias", True),
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="qwen",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.qwen1",),
)
