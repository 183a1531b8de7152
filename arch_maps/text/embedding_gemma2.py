"""The EmbeddingGemma 2 text stack: read both ways, layer inputs made from the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import gemma, llama
from arch_maps.text.windows import FULL, SLIDING, layer_types

DEFAULTS: Final = {
    **{"vocab_size": 262144, "hidden_size": 512, "intermediate_size": 2048},
    **{"num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 1},
    **{"hidden_size_per_layer_input": 512, "embedding_dim": 768, "sliding_window": 512},
    **{"max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "pad_token_id": 0},
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "default", "rope_theta": 1e6},
    },
}
"""The reference's values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    heads: Dim
    kinds: tuple[str, ...]
    head_dim: Mapping[str, Dim]
    kv_heads: Mapping[str, Dim]
    per_layer: Dim
    embedding: Dim


def sizes(facts: Facts) -> Sizes:
    """Read the sizes from facts that are filled with the defaults."""
    pattern = int(facts.size("sliding_window_pattern", 6))
    kinds = layer_types(facts, facts.count("num_hidden_layers"), pattern=pattern)
    kinds[-1] = FULL  # as the reference forces it
    wide, keys = _full_attention(facts, kinds)
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size("intermediate_size"),
        heads=facts.size("num_attention_heads"),
        kinds=tuple(kinds),
        head_dim={SLIDING: facts.size("head_dim"), FULL: wide},
        kv_heads={SLIDING: facts.size("num_key_value_heads"), FULL: keys},
        per_layer=facts.size("hidden_size_per_layer_input"),
        embedding=facts.size("embedding_dim"),
    )


def _full_attention(facts: Facts, kinds: list[str]) -> tuple[Dim, Dim]:
    """Head size and key-value heads of full attention, stated once or layer by layer."""
    by_layer = facts.data.get("per_layer_config")
    if not isinstance(by_layer, Mapping) or not by_layer:
        return facts.size("global_head_dim"), facts.size("num_global_key_value_heads")
    stated = {int(index): dict(entry) for index, entry in by_layer.items()}
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    entry = stated.get(full[0], {})
    if stated != dict.fromkeys(full, entry):
        facts.problem(
            f"config.json: {facts.path}per_layer_config must say the same of every layer with full "
            "attention and nothing of the others; this map knows no other kinds"
        )
    inner = Facts(entry, path=f"{facts.path}per_layer_config.{full[0]}.", parent=facts)
    return inner.size("head_dim"), inner.size("num_key_value_heads")


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, layers, final norm and the projection to an embedding, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", len(s.kinds)):
        _attention(layer / "self_attn", s, s.kinds[index])
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        for name in gemma.SANDWICH:
            layer.norm(name, s.hidden)
        layer.tensor("layer_scalar", 1, kind=Kind.NORM)
        inputs = layer / "ple_block"
        inputs.linear("per_layer_input_gate", s.per_layer, s.hidden)
        inputs.linear("per_layer_projection", s.hidden, s.per_layer)
        inputs.norm("post_per_layer_input_norm", s.hidden)
    at.linear("ple.per_layer_model_projection", len(s.kinds) * s.per_layer, s.hidden)
    at.norm("ple.per_layer_projection_norm", s.per_layer)
    at.norm("norm", s.hidden)
    at.linear("embedding_projection", s.embedding, s.hidden)


def _attention(at: Mount, s: Sizes, kind: str) -> None:
    size, keys = s.head_dim[kind], s.kv_heads[kind] * s.head_dim[kind]
    at.linear("q_proj", s.heads * size, s.hidden)
    at.linear("k_proj", keys, s.hidden)
    at.linear("v_proj", keys, s.hidden)
    at.linear("o_proj", s.hidden, s.heads * size)
    at.norm("q_norm", size)
    at.norm("k_norm", size)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The text section as the runtime reads it, from facts that are filled with the defaults."""
    gemma.expect_tanh_gelu(facts)
    facts.expect("attention_bias", False, default=False, why="this map has no such biases")
    s = sizes(facts)
    stated = facts.data["rope_parameters"]
    rope = {}
    for kind in (SLIDING, FULL):
        path = f"{facts.path}rope_parameters.{kind}."
        inner = Facts({"rope_parameters": stated.get(kind)}, path=path, parent=facts)
        rope[kind] = spell.rope(inner)
        spell.require_rope_type(inner, rope[kind], allowed=("default",))
    full = {"head_dim": int(s.head_dim[FULL]), "num_key_value_heads": int(s.kv_heads[FULL])}
    return {
        **facts.data,
        "model_type": "embedding_gemma2_text",
        "layer_types": list(s.kinds),
        "per_layer_config": {
            f"{index:02d}": dict(full) for index, kind in enumerate(s.kinds) if kind == FULL
        },
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_parameters": rope,
        "pad_token_id": facts.data["pad_token_id"],
    }
