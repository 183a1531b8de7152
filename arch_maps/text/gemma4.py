"""The Gemma 4 text stack: two kinds of attention, shared keys and values, per-layer embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import gemma, llama, moe
from arch_maps.text.windows import FULL, SLIDING, layer_types

DEFAULTS: Final = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "global_head_dim": 512,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
"""The reference's values."""

_CAUSAL: Final = "the runtimes attend backwards only, but for the tokens of a picture"
_PAD: Final = "the runtimes look the layers' own embeddings of soft tokens up as token 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    heads: Dim
    kinds: tuple[str, ...]
    """Attention of each layer, full or sliding."""
    head_dim: Mapping[str, Dim]
    kv_heads: Mapping[str, Dim]
    shared: int
    """Last layers that take keys and values from the last layer of their kind before them."""
    one_projection: bool
    """Whether full attention takes its values from the keys' projection."""
    wide_mlp: bool
    """Whether the layers that share keys and values have twice the intermediate size."""
    per_layer: Dim | None
    """Width of a layer's own embedding of each token."""
    per_layer_vocab: Dim
    experts: moe.Experts | None

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.kinds)

    def shares(self, index: int) -> bool:
        """Whether the layer has no keys and values of its own."""
        return index >= self.layers - self.shared


def sizes(facts: Facts, *, drafter: bool = False) -> Sizes:
    """Read the sizes from facts that are filled with the defaults.

    All layers of a ``drafter`` take their keys and values from the model it drafts for.
    """
    layers = facts.count("num_hidden_layers")
    kinds = layer_types(facts, layers, pattern=6)
    kinds[-1] = FULL  # as the reference forces it
    shared = _optional(facts, "num_kv_shared_layers")
    first = layers - int(shared or 0)
    if drafter:
        facts.expect(
            "num_kv_shared_layers", layers, 0, default=0, why="a drafter has no keys of its own"
        )
        shared = Dim(layers, "num_hidden_layers")
    elif shared and not set(kinds[first:]) <= set(kinds[: max(0, first)]):
        facts.problem(
            f"config.json: {facts.path}num_kv_shared_layers = {int(shared)} leaves a kind of "
            "attention without a layer that computes keys and values"
        )
    head_dim, kv_heads = facts.size("head_dim"), facts.size("num_key_value_heads")
    one_projection = facts.flag("attention_k_eq_v", False)
    wide, wide_kv = _full_attention(facts, kinds, kv_heads, one_projection)
    experts = None
    hidden = facts.size("hidden_size")
    if facts.flag("enable_moe_block", False):
        experts = moe.Experts(
            count=facts.size("num_experts"),
            hidden=hidden,
            intermediate=facts.size("moe_intermediate_size"),
            fused=True,
        )
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=hidden,
        intermediate=facts.size("intermediate_size"),
        heads=facts.size("num_attention_heads"),
        kinds=tuple(kinds),
        head_dim={SLIDING: head_dim, FULL: wide},
        kv_heads={SLIDING: kv_heads, FULL: wide_kv},
        shared=int(shared or 0),
        one_projection=one_projection,
        wide_mlp=facts.flag("use_double_wide_mlp", False),
        per_layer=_optional(facts, "hidden_size_per_layer_input"),
        per_layer_vocab=facts.size("vocab_size_per_layer_input"),
        experts=experts,
    )


def _optional(facts: Facts, name: str) -> Dim | None:
    """A size, or None where it is 0 or not stated."""
    return facts.size(name) if facts.data.get(name) else None


def _full_attention(
    facts: Facts, kinds: list[str], kv_heads: Dim, one_projection: bool
) -> tuple[Dim, Dim]:
    """Head size and key-value heads of the layers with full attention.

    Transformers 5 writes them by layer (``per_layer_config``), published configs as ``global_``.
    """
    by_layer = facts.data.get("per_layer_config")
    if not isinstance(by_layer, Mapping) or not by_layer:
        own = facts.data.get("num_global_key_value_heads") is not None and one_projection
        heads = facts.size("num_global_key_value_heads") if own else kv_heads
        return facts.size("global_head_dim"), heads
    stated = {int(index): dict(entry) for index, entry in by_layer.items()}
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    entry = stated.get(full[0], {})
    if stated != dict.fromkeys(full, entry):
        facts.problem(
            f"config.json: {facts.path}per_layer_config must say the same of every layer with full "
            "attention and nothing of the others; the runtimes know no other kinds"
        )
    path = f"{facts.path}per_layer_config.{full[0]}."
    inner = Facts(entry, path=path, parent=facts)
    if "num_key_value_heads" in entry and not one_projection:
        inner.expect(
            "num_key_value_heads",
            int(kv_heads),
            default=None,
            why="the runtimes give full attention other heads only where attention_k_eq_v is true",
        )
    return inner.size("head_dim", 512), inner.size("num_key_value_heads", int(kv_heads))


def stack(at: Mount, s: Sizes, *, table: Kind = Kind.EMBEDDING) -> None:
    """Embeddings, decoder layers and final norm, below ``at``."""
    at.embedding("embed_tokens", s.vocab, s.hidden, kind=table)
    for index, layer in at.layers("layers", s.layers):
        _attention(layer / "self_attn", s, index)
        twice = 2 if s.wide_mlp and s.shares(index) else 1
        llama.gated_mlp(layer / "mlp", s.hidden, twice * s.intermediate)
        for name in gemma.SANDWICH:
            layer.norm(name, s.hidden)
        layer.tensor("layer_scalar", 1, kind=Kind.NORM)
        if s.experts:
            _experts(layer, s, s.experts)
        if s.per_layer:
            layer.linear("per_layer_input_gate", s.per_layer, s.hidden)
            layer.linear("per_layer_projection", s.hidden, s.per_layer)
            layer.norm("post_per_layer_input_norm", s.hidden)
    if s.per_layer:
        width = s.layers * s.per_layer
        at.embedding("embed_tokens_per_layer", s.per_layer_vocab, width)
        at.linear("per_layer_model_projection", width, s.hidden)
        at.norm("per_layer_projection_norm", s.per_layer)
    at.norm("norm", s.hidden)


def _attention(at: Mount, s: Sizes, index: int) -> None:
    kind = s.kinds[index]
    size, keys = s.head_dim[kind], s.kv_heads[kind] * s.head_dim[kind]
    at.linear("q_proj", s.heads * size, s.hidden)
    at.linear("o_proj", s.hidden, s.heads * size)
    at.norm("q_norm", size)
    at.changed_values("values are normalised, and layers share them")
    if s.shares(index):
        why = "the layer takes keys and values from an earlier one"
        for name in ("k_proj", "v_proj"):
            at.drop(f"{name}.weight", why, keys, s.hidden)
        at.drop("k_norm.weight", why, size)
        return
    at.linear("k_proj", keys, s.hidden)
    at.norm("k_norm", size)
    if not (s.one_projection and kind == FULL):
        at.linear("v_proj", keys, s.hidden)


def _experts(layer: Mount, s: Sizes, e: moe.Experts) -> None:
    """Routed experts beside the dense MLP, with norms of their own."""
    layer.linear("router.proj", e.count, e.hidden, kind=Kind.GATE)
    layer.tensor("router.scale", e.hidden, kind=Kind.NORM)
    layer.tensor("router.per_expert_scale", e.count, kind=Kind.NORM)
    moe.experts(layer, e, target="experts.switch_glu")
    for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
        layer.norm(name, s.hidden)
    layer.norm("pre_feedforward_layernorm_2", s.hidden)


def spell_config(
    facts: Facts, *, model_type: str = "gemma4_text", drafter: bool = False
) -> dict[str, Any]:
    """The text section that both runtimes read, from facts that are filled with the defaults."""
    gemma.expect_tanh_gelu(facts)
    facts.expect("attention_bias", False, default=False, why="the runtimes have no such biases")
    facts.expect("use_bidirectional_attention", "vision", None, default=None, why=_CAUSAL)
    facts.expect("pad_token_id", 0, None, default=0, why=_PAD)
    facts.expect(
        "tie_word_embeddings", True, default=True, why="the runtimes reuse the input embedding"
    )
    s = sizes(facts, drafter=drafter)
    out = dict(facts.data)
    out.pop("per_layer_config", None)
    out.update(
        model_type=model_type,
        global_head_dim=int(s.head_dim[FULL]),
        num_global_key_value_heads=int(s.kv_heads[FULL]) if s.one_projection else None,
        layer_types=list(s.kinds),
        sliding_window_pattern=s.kinds.index(FULL) + 1,
        num_kv_shared_layers=s.shared,
        attention_k_eq_v=s.one_projection,
        use_double_wide_mlp=s.wide_mlp,
        hidden_size_per_layer_input=int(s.per_layer or 0),
        enable_moe_block=s.experts is not None,
        num_experts=int(s.experts.count) if s.experts else None,
        top_k_experts=int(facts.size("top_k_experts")) if s.experts else None,
        moe_intermediate_size=int(s.experts.intermediate) if s.experts else None,
        final_logit_softcapping=facts.data.get("final_logit_softcapping"),
        use_bidirectional_attention=facts.data.get("use_bidirectional_attention"),
        rope_traditional=False,
        rope_parameters=_rope(facts),
        tie_word_embeddings=True,
    )
    return out


def _rope(facts: Facts) -> dict[str, Any]:
    """Position settings by kind of attention."""
    stated = facts.data["rope_parameters"]
    allowed = {FULL: ("proportional", "default"), SLIDING: ("default",)}
    settings: dict[str, Any] = {}
    for kind, types in allowed.items():
        entry = stated.get(kind) if isinstance(stated, Mapping) else None
        path = f"{facts.path}rope_parameters.{kind}."
        inner = Facts(entry if isinstance(entry, Mapping) else {}, path=path, parent=facts)
        why = "the runtimes compute no other scaling for these layers"
        inner.expect("rope_type", *types, default=None, why=why)
        settings[kind] = {
            "partial_rotary_factor": inner.number("partial_rotary_factor", 1.0),
            **inner.data,
            "rope_theta": inner.number("rope_theta"),
        }
    return settings
