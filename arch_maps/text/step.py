"""The Step 3.5 and 3.7 text stack: gated heads, more in windows, experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from arch_maps import config as spell
from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama, moe
from arch_maps.text.windows import FULL, SLIDING

_MTP: Final = (
    "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
)
_PER_LAYER: Final = ("swiglu_limits", "swiglu_limits_shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the stack's shapes depend on."""

    vocab: Dim
    hidden: Dim
    intermediate: Dim
    head_dim: Dim
    heads: Mapping[str, Dim]
    """Query heads by kind of layer."""
    kv_heads: Dim
    kinds: tuple[str, ...]
    """Full attention or a window, of every layer and of the drafter's after them."""
    layers: int
    sparse: tuple[bool, ...]
    experts: Dim
    expert: Dim
    shared: Dim


def _named(facts: Facts, published: str, reference: str, default: int) -> Dim:
    """A size under the release's name or transformers 5's."""
    return facts.size(published if published in facts.data else reference, default)


def sizes(facts: Facts) -> Sizes:
    """Read the sizes, in the release's spelling or in transformers 5's."""
    layers = facts.count("num_hidden_layers")
    heads = facts.size("num_attention_heads")
    other = facts.data.get("attention_other_setting") or {}
    inner = Facts(other, path=f"{facts.path}attention_other_setting.", parent=facts)
    near = inner.size("num_attention_heads", int(heads))
    if facts.data.get("num_sliding_attention_heads") is not None:
        near = facts.size("num_sliding_attention_heads")
    kinds = facts.data.get("layer_types") or [FULL] * layers
    if len(kinds) < layers or set(kinds) - {FULL, SLIDING}:
        facts.problem(
            f"config.json: {facts.path}layer_types must list {layers} layers as {FULL} or {SLIDING}"
        )
        kinds = [FULL] * layers
    return Sizes(
        vocab=facts.size("vocab_size"),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size("intermediate_size"),
        head_dim=facts.size("head_dim", 128),
        heads={FULL: heads, SLIDING: near},
        kv_heads=_named(facts, "num_attention_groups", "num_key_value_heads", 8),
        kinds=tuple(kinds),
        layers=layers,
        sparse=_sparse(facts, layers),
        experts=_named(facts, "moe_num_experts", "n_routed_experts", 288),
        expert=facts.size("moe_intermediate_size", 1280),
        shared=_named(facts, "share_expert_dims", "share_expert_dim", 1280),
    )


def _sparse(facts: Facts, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: a list of kinds, or the indices of those, maybe as text."""
    kinds = facts.data.get("mlp_layer_types")
    if isinstance(kinds, list):
        return tuple(kind == "sparse" for kind in kinds[:layers])
    listed = facts.data.get("moe_layers_enum", range(3, layers))
    items = listed.split(",") if isinstance(listed, str) else listed
    chosen = {int(item) for item in items if str(item).strip()}
    return tuple(index in chosen for index in range(layers))


def stack(at: Mount, s: Sizes) -> None:
    """Embedding, decoder layers and final norm, below ``at``; norms multiply by 1 + weight."""
    at.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in at.layers("layers", s.layers):
        _around(layer, s, s.kinds[index])
        if not s.sparse[index]:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
            continue
        experts = layer.at(source="moe", target="mlp")
        gate = experts.input("gate.weight", s.experts, s.hidden)
        experts.rule("gate.gate.weight", gate, Kind.GATE)
        experts.rule("gate.router_bias", experts.input("router_bias", s.experts), Kind.STATE)
        inward, outward = (s.expert, s.hidden), (s.hidden, s.expert)
        for name, shape in (("gate", inward), ("up", inward), ("down", outward)):
            whole = experts.input(f"{name}_proj.weight", s.experts, *shape)
            experts.rule(f"switch_mlp.{name}_proj.weight", whole, Kind.LINEAR)
        shared = layer.at(source="share_expert", target="mlp.share_expert")
        llama.gated_mlp(shared, s.hidden, s.shared)
    at.norm("norm", s.hidden, offset=1.0)


def _around(layer: Mount, s: Sizes, kind: str) -> None:
    attention, wide = layer / "self_attn", s.heads[kind] * s.head_dim
    attention.linear("q_proj", wide, s.hidden)
    attention.linear("k_proj", s.kv_heads * s.head_dim, s.hidden)
    attention.linear("v_proj", s.kv_heads * s.head_dim, s.hidden)
    attention.linear("o_proj", s.hidden, wide)
    attention.linear("g_proj", s.heads[kind], s.hidden)
    attention.norm("q_norm", s.head_dim, offset=1.0)
    attention.norm("k_norm", s.head_dim, offset=1.0)
    layer.norm("input_layernorm", s.hidden, offset=1.0)
    layer.norm("post_attention_layernorm", s.hidden, offset=1.0)


def _dense(layer: Mount, *, s: Sizes, kind: str) -> None:
    _around(layer, s, kind)
    llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)


def drop_mtp(root: Mount, facts: Facts, s: Sizes, *, text: str) -> None:
    """The release's multi-token-prediction layers, which stand behind the others."""
    more = facts.count("num_nextn_predict_layers") if _predicts(facts) else 0
    for index in range(s.layers, s.layers + more):
        kind = s.kinds[index] if index < len(s.kinds) else FULL
        moe.drop_block(root, f"{text}.layers.{index}", partial(_dense, s=s, kind=kind), _MTP)
        at = root.at(source=f"{text}.layers.{index}", target="")
        at.drop("eh_proj.weight", _MTP, s.hidden, 2 * s.hidden)
        at.drop("transformer.shared_head.output.weight", _MTP, s.vocab, s.hidden)
        for name in ("enorm", "hnorm", "transformer.shared_head.norm"):
            at.drop(f"{name}.weight", _MTP, s.hidden)
        at.bind_drops("eh_proj.weight")


def _predicts(facts: Facts) -> bool:
    return bool(facts.data.get("num_nextn_predict_layers"))


def spell_config(facts: Facts, s: Sizes) -> dict[str, Any]:
    """The text section as the runtime reads it: the release's own spelling."""
    why = "the runtime computes it this way whatever it says"
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        facts.expect(name, False, default=False, why=why)
    for name in _ALWAYS:
        facts.expect(name, True, default=True, why=why)
    for name, word in (("hidden_act", "silu"), ("moe_router_activation", "sigmoid")):
        facts.expect(name, word, default=word, why=why)
    if float(facts.data.get("query_pre_attn_scalar") or s.head_dim) != int(s.head_dim):
        facts.problem(f"config.json: {facts.path}query_pre_attn_scalar must be head_dim here")
    kinds = s.kinds[: s.layers]
    rope = {kind: _rope(facts, kind, kinds) for kind in sorted(set(kinds))}
    scaled = {k: v for k, v in rope.get(FULL, {}).items() if k not in _POSITIONS}
    if SLIDING in rope and rope[SLIDING]["rope_type"] != "default":
        facts.problem(f"config.json: {facts.path}rope_parameters: windows have plain positions")
    limits = {name: (facts.data.get(name) or [0.0] * s.layers)[: s.layers] for name in _PER_LAYER}
    out = {key: value for key, value in facts.data.items() if key not in _REPLACED}
    return {
        **out,
        **limits,
        "model_type": "step3p5",
        "head_dim": int(s.head_dim),
        "num_attention_groups": int(s.kv_heads),
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": int(s.heads[SLIDING]),
            "num_attention_groups": int(s.kv_heads),
            "head_dim": int(s.head_dim),
        },
        "layer_types": list(kinds),
        "rope_theta": [rope[kind]["rope_theta"] for kind in kinds],
        "partial_rotary_factors": [rope[kind]["partial_rotary_factor"] for kind in kinds],
        "rope_scaling": scaled if rope.get(FULL, {}).get("rope_type") != "default" else None,
        "yarn_only_types": [FULL],
        "sliding_window": facts.data.get("sliding_window"),
        "moe_layers_enum": [index for index, sparse in enumerate(s.sparse) if sparse],
        "moe_num_experts": int(s.experts),
        "moe_top_k": int(_named(facts, "moe_top_k", "num_experts_per_tok", 8)),
        "moe_intermediate_size": int(s.expert),
        "share_expert_dim": int(s.shared),
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": facts.number("moe_router_scaling_factor", 1.0),
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "use_head_wise_attn_gate": True,
        "rms_norm_eps": facts.number("rms_norm_eps", 1e-5),
        "max_position_embeddings": int(facts.size("max_position_embeddings", 128000)),
        "tie_word_embeddings": False,
    }


_ALWAYS: Final = (
    *("use_head_wise_attn_gate", "use_moe_router_bias", "norm_expert_weight", "zero_centered"),
)
_POSITIONS: Final = ("rope_theta", "partial_rotary_factor")
_REPLACED: Final = frozenset(
    {"rope_parameters", "per_layer_config", "mlp_layer_types", "share_expert_dims"}
    | {"num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"}
)


def _rope(facts: Facts, kind: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Position settings of the layers of one kind, which agree in both spellings."""
    by_kind = facts.data.get("rope_parameters") or {}
    first = kinds.index(kind)
    if isinstance(by_kind.get(kind), Mapping):
        settings = {"partial_rotary_factor": 1.0, **by_kind[kind]}
    else:
        thetas, parts = facts.data.get("rope_theta", 1e4), facts.data.get("partial_rotary_factors")
        settings = {
            "rope_type": "default",
            "rope_theta": thetas[first] if isinstance(thetas, list) else thetas,
            "partial_rotary_factor": parts[first] if parts else 1.0,
        }
        if kind == FULL:
            settings.update(facts.data.get("rope_scaling") or {})
    spell.require_rope_type(facts, settings)
    settings["type"] = settings["rope_type"]
    return settings
