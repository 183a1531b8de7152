"""The Llama 4 text stack: attention in chunks, every fourth layer without positions, experts."""

from __future__ import annotations

from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Permute, Slice
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama

DEFAULTS: Final = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "use_qk_norm": True,
}
"""The reference's facts."""
_PERIOD: Final = 4
"""Layers from one without positions to the next, which the runtimes have in their code."""


def sparse_layers(facts: Facts, layers: int) -> list[int]:
    """Layers with experts, as the config lists them or counts them off."""
    stated, step = facts.data.get("moe_layers"), facts.data.get("interleave_moe_layer_step")
    if isinstance(stated, list):
        return stated
    return list(range(step - 1, layers, step)) if type(step) is int and step > 0 else []


def stack(at: Mount, facts: Facts, s: llama.Sizes) -> None:
    """Embedding, layers and final norm, below ``at``."""
    sparse = sparse_layers(facts, s.layers)
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        if index in sparse:
            _experts(layer / "feed_forward", facts, s)
        else:
            inner = facts.size("intermediate_size_mlp")
            llama.gated_mlp(layer / "feed_forward", s.hidden, inner)
        for name in s.norms:
            layer.norm(name, s.hidden)
    at.norm("norm", s.hidden)


def _experts(at: Mount, facts: Facts, s: llama.Sizes) -> None:
    """Experts as the release stacks them, [experts, in, out] with gates before ups."""
    count, inner = facts.size("num_local_experts"), s.intermediate
    at.linear("router", count, s.hidden, kind=Kind.GATE)
    twice = at.input("experts.gate_up_proj", count, s.hidden, 2 * inner)
    for name, start in (("gate_proj", 0), ("up_proj", int(inner))):
        half = Slice(twice, 2, start, start + int(inner))
        at.rule(f"experts.{name}.weight", Permute(half, (0, 2, 1)), Kind.LINEAR)
    down = at.input("experts.down_proj", count, inner, s.hidden)
    at.rule("experts.down_proj.weight", Permute(down, (0, 2, 1)), Kind.LINEAR)
    llama.gated_mlp(at / "shared_expert", s.hidden, inner)


def spell_config(config: dict[str, Any], facts: Facts, s: llama.Sizes) -> None:
    """Write the stack's facts under the names both runtimes read, in place."""
    facts.expect("num_experts_per_tok", 1, default=1, why="the runtimes take one expert")
    rotated = [int((index + 1) % _PERIOD != 0) for index in range(s.layers)]
    if (facts.data.get("no_rope_layers") or rotated)[: s.layers] != rotated:
        facts.problem(
            f"config.json: {facts.path}no_rope_layers: the runtimes leave positions out of every "
            "fourth layer"
        )
    step = facts.size("interleave_moe_layer_step")
    if sparse_layers(facts, s.layers) != list(range(int(step) - 1, s.layers, int(step))):
        facts.problem(f"config.json: {facts.path}moe_layers: the runtimes have them at each step")
    llama.spell_config(
        config, facts, s, max_positions=131072, eps=("rms_norm_eps", 1e-5), theta=500000.0
    )
    config.update(
        **{name: facts.data[name] for name in DEFAULTS},
        attention_bias=s.attention_bias,
        no_rope_layers=rotated,
        moe_layers=sparse_layers(facts, s.layers),
        rope_traditional=False,
        tie_word_embeddings=False,
    )
    spell.require_rope_type(facts, config["rope_parameters"], allowed=("default", "llama3"))
