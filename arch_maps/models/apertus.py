"""Apertus: Llama's attention with per-head norms, and an MLP with the learned xIELU activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Reshape
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return replace(
        llama.sizes(facts, qk_norm=True),
        plain_mlp=("up_proj", "down_proj"),
        norms=("attention_layernorm", "feedforward_layernorm"),
    )


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    s = _sizes(facts)
    llama.causal_lm(root, s)
    for _index, layer in (root / "model").layers("layers", s.layers):
        activation = layer / "mlp.act_fn"
        for name in ("alpha_p", "alpha_n"):
            activation.rule(name, Reshape(activation.input(name, 1), ()), Kind.STATE)
        for name in ("beta", "eps"):
            activation.tensor(name, kind=Kind.STATE)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    why = "the runtimes compute xIELU whatever it says"
    facts.expect("hidden_act", "xielu", default="xielu", why=why)
    facts.expect("post_norm", False, default=False, why="the runtimes norm before each half")
    facts.expect("qk_norm", True, default=True, why="the runtimes always norm queries and keys")
    out = spell.start(config)
    s = _sizes(facts)
    if int(s.head_dim) * int(s.heads) != int(s.hidden):
        facts.problem("config.json: head_dim must be hidden_size / num_attention_heads here")
    rope = _rope(facts)
    spell.require_rope_type(facts, rope)
    out.update(
        attention_bias=False,
        mlp_bias=s.mlp_bias,
        num_key_value_heads=int(s.kv_heads),
        tie_word_embeddings=s.tied,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        max_position_embeddings=int(facts.size("max_position_embeddings", 65536)),
        post_norm=False,
        qk_norm=True,
        rope_traditional=False,
        **spell.spell_rope(rope),
    )
    return out


def _rope(facts: Facts) -> dict[str, Any]:
    """The stated position settings, or the reference's default, which scales them."""
    if facts.data.get("rope_scaling") or facts.data.get("rope_parameters"):
        return spell.rope(facts, default_theta=12e6)
    return {
        "rope_type": "llama3",
        "rope_theta": facts.number("rope_theta", 12e6),
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


MAP = ArchMap(
    model_type="apertus",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("transformers", {}),),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama",),
)
