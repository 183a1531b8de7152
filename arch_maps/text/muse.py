"""The Muse Glimmer text stack: gated attention, unscaled query norms, positions in windows only."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Mount
from arch_maps.text import llama
from arch_maps.text.gemma import SANDWICH
from arch_maps.text.windows import FULL, SLIDING


def sizes(facts: Facts) -> llama.Sizes:
    """Read the sizes; the defaults are the reference's."""
    return llama.sizes(facts, kv_heads=2, head_dim=128)


def stack(at: Mount, s: llama.Sizes) -> None:
    """Embedding, decoder layers and final norm, below ``at``; the runtime adds 1 to the norms."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for _, layer in at.layers("layers", s.layers):
        llama.attention(layer / "self_attn", s)
        layer.linear("self_attn.gate_proj", s.heads * s.head_dim, s.hidden)
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        for name in SANDWICH:
            layer.norm(name, s.hidden)
    at.norm("norm", s.hidden)


def spell_config(facts: Facts, s: llama.Sizes) -> dict[str, Any]:
    """The text section as the runtime reads it."""
    why = "the runtime computes SiLU whatever it says"
    facts.expect("hidden_activation", "silu", default="silu", why=why)
    why = "the runtime has a head of its own"
    facts.expect("tie_word_embeddings", False, default=False, why=why)
    rope = spell.rope(facts)
    spell.require_rope_type(facts, rope)
    kinds = _kinds(facts, s.layers)
    bases = facts.data.get("layer_rope_theta")
    if bases is None:
        bases = [0 if index % 4 == 0 else rope["rope_theta"] for index in range(s.layers)][::-1]
    if len(bases) != s.layers or {base for base in bases if base} - {rope["rope_theta"]}:
        facts.problem(
            f"config.json: {facts.path}layer_rope_theta must list 0 or {rope['rope_theta']} for "
            f"{s.layers} layers; the reference rotates all layers by one base"
        )
    return {
        **facts.data,
        "model_type": "muse_glimmer_text",
        "head_dim": int(s.head_dim),
        "num_key_value_heads": int(s.kv_heads),
        "hidden_activation": "silu",
        "attention_bias": s.attention_bias,
        "rms_norm_eps": facts.number("rms_norm_eps", 1e-5),
        "post_norm_eps": facts.number("post_norm_eps", 1e-8),
        "max_position_embeddings": int(facts.size("max_position_embeddings", 131072)),
        "sliding_window": int(facts.size("sliding_window", 2048)),
        "layer_types": kinds,
        "layer_rope_theta": bases,
        "qk_scale_factor": facts.number("qk_scale_factor", 3.87),
        "output_multiplier": facts.number("output_multiplier", 0.19611613513818404),
        "final_logit_softcapping": facts.number("final_logit_softcapping", 20.0),
        "tie_word_embeddings": False,
        **spell.spell_rope(rope),
    }


def _kinds(facts: Facts, layers: int) -> list[str]:
    """The listed kinds, or full attention at every fourth layer counted from the last."""
    default = [FULL if index % 4 == 0 else SLIDING for index in range(layers)][::-1]
    kinds: list[str] = facts.data.get("layer_types", default)
    known = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    if not known or len(kinds) != layers or FULL not in kinds:
        facts.problem(
            f"config.json: {facts.path}layer_types must list {layers} layers as {FULL} or "
            f"{SLIDING}, with full attention at one of them"
        )
        return default
    return kinds
