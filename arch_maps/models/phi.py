"""Phi-1, Phi-1.5 and Phi-2: attention and a plain MLP side by side, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(
        llama.sizes(facts),
        attention_bias=True,
        output="dense",
        plain_mlp=("fc1", "fc2"),
        mlp_bias=True,
        norms=("input_layernorm",),
        norm_bias=True,
        final_norm="final_layernorm",
    )


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("qk_layernorm", False, default=False, why="the runtimes have no such norms")
    facts.expect(
        "tie_word_embeddings", False, default=False, why="the runtimes have a head of its own"
    )
    s = _sizes(facts)
    llama.causal_lm(root, s)
    root.tensor("lm_head.bias", s.vocab, kind=Kind.BIAS)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute the tanh form of GELU whatever it says"
    facts.expect("hidden_act", "gelu_new", "gelu_pytorch_tanh", default="gelu_new", why=why)
    out = spell.start(config)
    s = _sizes(facts)
    rope = spell.rope(facts)
    rope.setdefault("partial_rotary_factor", 0.5)
    spell.require_rope_type(facts, rope, allowed=("default",))
    out.update(
        hidden_size=int(s.hidden),
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=False,
        layer_norm_eps=facts.number("layer_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 2048)),
        **spell.spell_rope(rope),
    )
    return out


MAP = ArchMap(
    model_type="phi",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
