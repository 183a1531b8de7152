"""RecurrentGemma (Griffin): gated linear recurrences, every third layer a window of attention."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import griffin

_FIXED = "the runtimes fix it in code"


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    griffin.causal_lm(root, facts)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    tanh = "gelu_pytorch_tanh"
    facts.expect("hidden_activation", tanh, None, default=tanh, why=_FIXED)
    facts.expect("conv1d_width", 4, default=4, why=_FIXED)
    facts.expect("partial_rotary_factor", 0.5, None, default=0.5, why=_FIXED)
    facts.expect("num_key_value_heads", 1, default=1, why=_FIXED)
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    # The layers' norms have 1e-5 in code, the last one what is stated; on a residual stream that
    # starts at sqrt(hidden_size) times the embeddings the two are the same.
    facts.expect("rms_norm_eps", 1e-6, 1e-5, default=1e-6, why=_FIXED)
    hidden = int(facts.size("hidden_size"))
    facts.expect("lru_width", hidden, None, default=hidden, why="the runtimes have that width")
    rope = spell.rope(facts)
    rope.setdefault("partial_rotary_factor", 0.5)
    if rope["rope_theta"] != 10000 or rope["partial_rotary_factor"] != 0.5:
        facts.problem(
            "config.json: the runtimes rotate half of each head with a rope_theta of 10000"
        )
    spell.require_rope_type(facts, rope, allowed=("default",))
    out = spell.start(config)
    kinds = griffin.block_kinds(facts)
    out.update(
        num_key_value_heads=1,
        attention_bias=False,
        conv1d_width=4,
        logits_soft_cap=facts.number("logits_soft_cap", 30.0),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        attention_window_size=int(facts.size("attention_window_size", 2048)),
        embeddings_scale_by_sqrt_dim=True,
        block_types=kinds,
        _block_types=kinds,
        tie_word_embeddings=facts.flag("tie_word_embeddings", True),
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="recurrent_gemma",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.griffin",),
)
