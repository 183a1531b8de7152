"""The Gemma 3n text stack: alternating updates, low-rank residuals, shared keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Constant
from arch_maps.rules import Kind, Mount
from arch_maps.text import gemma, llama
from arch_maps.text.windows import FULL, SLIDING, layer_types, rope_by_kind

DEFAULTS: Final = {
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_kv_shared_layers": 15,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "laurel_rank": 64,
    "pad_token_id": 0,
}
"""The reference's values."""

_SPARSE_LAYERS: Final = 10
_SPARSITY: Final = 0.95
"""What the reference assumes of the first layers where the config says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    kinds: tuple[str, ...]
    """Attention of each layer, full or sliding."""
    shared: int
    """Last layers that take keys and values from the last layer of their kind before them."""
    per_layer: Dim
    """Width of a layer's own embedding of each token."""
    per_layer_vocab: Dim
    inputs: Dim
    """Versions of the hidden state that are kept side by side."""
    rank: Dim

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.kinds)


def sizes(facts: Facts) -> Sizes:
    """Read the sizes from facts that are filled with the defaults."""
    layers = facts.count("num_hidden_layers")
    kinds = layer_types(facts, layers, pattern=5)
    shared = int(facts.size("num_kv_shared_layers")) if _states(facts) else 0
    if set(kinds[: max(0, layers - shared)]) != {FULL, SLIDING}:
        facts.problem(
            f"config.json: {facts.path}num_kv_shared_layers = {shared} must leave a layer with "
            f"{FULL} and one with {SLIDING} before the layers that share: the runtimes need both"
        )
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=facts.size("hidden_size"),
        intermediate=_intermediate(facts, layers),
        heads=facts.size("num_attention_heads"),
        kv_heads=facts.size("num_key_value_heads"),
        head_dim=facts.size("head_dim"),
        kinds=tuple(kinds),
        shared=shared,
        per_layer=facts.size("hidden_size_per_layer_input"),
        per_layer_vocab=facts.size("vocab_size_per_layer_input"),
        inputs=facts.size("altup_num_inputs"),
        rank=facts.size("laurel_rank"),
    )


def _states(facts: Facts) -> bool:
    return facts.data.get("num_kv_shared_layers") != 0


def _intermediate(facts: Facts, layers: int) -> Dim:
    """One size, or a list of the same size for every layer."""
    stated = facts.data.get("intermediate_size")
    if not isinstance(stated, list):
        return facts.size("intermediate_size")
    if not stated or stated != [stated[0]] * layers:
        facts.problem(
            f"config.json: {facts.path}intermediate_size must state one size for all {layers} "
            "layers: mlx-vlm gives each of them the first one's"
        )
        return Dim(1, "intermediate_size")
    return facts.overruled({"intermediate_size": stated[0]}).size("intermediate_size")


def stack(at: Mount, s: Sizes, *, unshared: bool) -> None:
    """Embeddings, decoder layers and final norm, below ``at``.

    ``unshared``: the release has keys and values of its own in layers that never use them, as the
    runtimes' models do; else these are filled with zeros.
    """
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", s.layers):
        used = unshared or index < s.layers - s.shared
        _attention(layer / "self_attn", s, keyed=used)
        llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        for name in gemma.SANDWICH:
            layer.norm(name, s.hidden)
        _updates(layer / "altup", s)
        laurel = layer / "laurel"
        laurel.linear("linear_left", s.rank, s.hidden)
        laurel.linear("linear_right", s.hidden, s.rank)
        laurel.norm("post_laurel_norm", s.hidden)
        layer.linear("per_layer_input_gate", s.per_layer, s.hidden)
        layer.linear("per_layer_projection", s.hidden, s.per_layer)
        layer.norm("post_per_layer_input_norm", s.hidden)
    width = s.layers * s.per_layer
    at.embedding("embed_tokens_per_layer", s.per_layer_vocab, width)
    at.linear("per_layer_model_projection", width, s.hidden)
    at.norm("per_layer_projection_norm", s.per_layer)
    for name in ("altup_projections", "altup_unembed_projections"):
        for index in range(int(s.inputs) - 1):
            at.linear(f"{name}.{index}", s.hidden, s.hidden)
    at.norm("norm", s.hidden)


def _attention(at: Mount, s: Sizes, *, keyed: bool) -> None:
    at.linear("q_proj", s.heads * s.head_dim, s.hidden)
    at.norm("q_norm", s.head_dim)
    at.linear("o_proj", s.hidden, s.heads * s.head_dim)
    width = s.kv_heads * s.head_dim
    at.changed_values("values are normalised, and layers share them")
    if keyed:
        at.linear("k_proj", width, s.hidden)
        at.linear("v_proj", width, s.hidden)
        at.norm("k_norm", s.head_dim)
        return
    for name in ("k_proj", "v_proj"):
        at.rule(f"{name}.weight", Constant((width, s.hidden), 0.0), Kind.LINEAR)
    at.rule("k_norm.weight", Constant((s.head_dim,), 1.0), Kind.NORM)


def _updates(at: Mount, s: Sizes) -> None:
    """Small projections that the runtimes cast and clip as they are, so never quantized."""
    at.tensor("correct_output_scale", s.hidden, kind=Kind.NORM)
    at.linear("correction_coefs", s.inputs, s.inputs, kind=Kind.GATE)
    at.linear("prediction_coefs", s.inputs * s.inputs, s.inputs, kind=Kind.GATE)
    at.linear("modality_router", s.inputs, s.hidden, kind=Kind.GATE)
    at.norm("router_norm", s.hidden)


def spell_config(facts: Facts) -> dict[str, Any]:
    """The text section that both runtimes read, from facts that are filled with the defaults."""
    gemma.expect_tanh_gelu(facts)
    gemma.expect_causal(facts)
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtimes reuse the input embedding"
    )
    s = sizes(facts)
    full, sliding = rope_by_kind(facts, full_theta=1e6, sliding_theta=1e4)
    for settings in (full, sliding):
        if settings["rope_type"] != "default":
            facts.problem(
                f"config.json: {facts.path}rope_type is {settings['rope_type']!r}; mlx-lm knows "
                "plain positions only"
            )
    return {
        **facts.data,
        "model_type": "gemma3n_text",
        "intermediate_size": [int(s.intermediate)] * s.layers,
        "layer_types": list(s.kinds),
        "num_kv_shared_layers": s.shared,
        "activation_sparsity_pattern": _sparsity(facts, s.layers),
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": sliding["rope_theta"],
        "rope_scaling": None,
        "rope_parameters": {FULL: full, SLIDING: sliding},
        "rope_traditional": False,
        "tie_word_embeddings": True,
    }


def _sparsity(facts: Facts, layers: int) -> list[float]:
    """The share of each layer's activations that are cut to zero."""
    stated = facts.data.get("activation_sparsity_pattern")
    if stated is None:
        sparse = _SPARSE_LAYERS if layers > _SPARSE_LAYERS else 0
        return [_SPARSITY] * sparse + [0.0] * (layers - sparse)
    numbers = isinstance(stated, list) and all(type(one) in (int, float) for one in stated)
    if not numbers or len(stated) != layers or not all(0 <= one < 1 for one in stated):
        facts.problem(
            f"config.json: {facts.path}activation_sparsity_pattern must list {layers} shares "
            "from 0 to below 1"
        )
        return [0.0] * layers
    return list(stated)
