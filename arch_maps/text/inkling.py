"""Inkling's text stack: relative biases for positions, short convolutions, interleaved experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Constant, Expr, Permute, Reshape, Slice, Source
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama

_LOCAL: Final = "hybrid_sliding"
_GLOBAL: Final = "hybrid"
_NAMES: Final = {
    "sconv_kernel_size": ("conv_kernel_size",),
    "model_max_length": ("max_position_embeddings",),
    "sliding_window_size": ("sliding_window",),
    "n_routed_experts": ("num_local_experts",),
}
"""The release's names of settings, and transformers 5's."""
_DEFAULTS: Final = {
    **{"swa_num_attention_heads": 64, "swa_num_key_value_heads": 16, "swa_head_dim": 128},
    **{"sliding_window_size": 512, "d_rel": 16, "rel_extent": 1024, "sconv_kernel_size": 4},
    **{"n_routed_experts": 256, "num_experts_per_tok": 6, "n_shared_experts": 2},
    **{"model_max_length": 131072, "head_dim": 128},
}
"""The reference's sizes, where a release may leave them out."""
MTP: Final = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What the shapes of one kind of attention depend on."""

    heads: Dim
    kv_heads: Dim
    head_dim: Dim
    extent: Dim
    """Tokens back for which there is a bias of the position."""


def released(facts: Facts) -> Facts:
    """The text's facts under the release's names, whichever generation wrote them.

    Releases call the experts' width ``intermediate_size`` and the dense layers' another;
    transformers 5 calls the dense layers' so.
    """
    found = {**_DEFAULTS, **{k: v for k, v in facts.data.items() if v is not None}}
    for name, others in _NAMES.items():
        stated = (facts.data.get(other) for other in (name, *others))
        found[name] = next((value for value in stated if value is not None), found.get(name))
    if facts.data.get("dense_intermediate_size") is None:
        found["dense_intermediate_size"] = facts.data.get("intermediate_size")
        found["intermediate_size"] = facts.data.get("moe_intermediate_size", 3072)
    return Facts(found, path=facts.path, parent=facts)


def local_layers(facts: Facts) -> list[bool]:
    """Which layers see a window only; all but every sixth unless a list says so."""
    layers = facts.count("num_hidden_layers")
    kinds, ids = facts.data.get("layer_types"), facts.data.get("local_layer_ids")
    if kinds is not None:
        if len(kinds) != layers or set(kinds) - {_LOCAL, _GLOBAL}:
            facts.problem(
                f"config.json: {facts.path}layer_types must list {layers} layers as {_LOCAL} or "
                f"{_GLOBAL}"
            )
            return [False] * layers
        return [kind == _LOCAL for kind in kinds]
    if ids is not None:
        return [index in ids for index in range(layers)]
    return [(index + 1) % 6 != 0 for index in range(layers)]


def sparse_layers(facts: Facts) -> list[bool]:
    """Which layers have experts; all but the first ``dense_mlp_idx`` unless a list says so."""
    layers = facts.count("num_hidden_layers")
    kinds = facts.data.get("mlp_layer_types")
    if kinds is None:
        dense = int(facts.size("dense_mlp_idx")) if facts.data.get("dense_mlp_idx") else 0
        return [index >= dense for index in range(layers)]
    if len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        facts.problem(
            f"config.json: {facts.path}mlp_layer_types must list {layers} layers as dense or sparse"
        )
        return [True] * layers
    return [kind == "sparse" for kind in kinds]


def _attention_sizes(facts: Facts, *, local: bool) -> Attention:
    prefix = "swa_" if local else ""
    return Attention(
        heads=facts.size(f"{prefix}num_attention_heads"),
        kv_heads=facts.size(f"{prefix}num_key_value_heads"),
        head_dim=facts.size(f"{prefix}head_dim"),
        extent=facts.size("sliding_window_size" if local else "rel_extent"),
    )


def _short_conv(at: Mount, name: str, channels: int, kernel: int) -> None:
    """A convolution over the last few tokens, each channel by itself."""
    weight = at.input(f"{name}.weight", channels, 1, kernel)
    at.rule(f"{name}.conv.weight", Permute(weight, (0, 2, 1)), Kind.CONV)


def _attention(at: Mount, facts: Facts, s: Attention) -> None:
    at.changed_values("a convolution mixes the values of neighbouring tokens")
    hidden, kernel = facts.size("hidden_size"), int(facts.size("sconv_kernel_size"))
    width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    rank = facts.size("d_rel")
    parts = {"wq_du": width, "wk_dv": kv_width, "wv_dv": kv_width, "wr_du": s.heads * rank}
    llama.joined(at, "qkvr_proj", parts, hidden)
    out = at.input("wo_ud.weight", hidden, width)
    at.rule("o_proj.weight", out, Kind.LINEAR)
    for name in ("k_sconv", "v_sconv"):
        _short_conv(at, name, kv_width, kernel)
    at.norm("q_norm", s.head_dim)
    at.norm("k_norm", s.head_dim)
    at.rule("rel_proj", at.input("rel_logits_proj.proj", rank, s.extent), Kind.POSITION)


def _halves(both: Source, *, joined: bool = False) -> tuple[Expr, Expr]:
    """Gate and up of a projection that holds their rows by turns, [..., 2 * rows, in].

    ``joined`` puts those of all experts under each other, where the runtime has one matrix.
    """
    *lead, twice, inp = both.shape
    rows = twice // 2
    turns = Reshape(both, (*lead, rows, 2, inp))
    axis = len(lead) + 1
    shape = (int(lead[0]) * rows, inp) if joined else (*lead, rows, inp)
    gate, up = (Reshape(Slice(turns, axis, i, i + 1), shape) for i in range(2))
    return gate, up


def _gated(at: Mount, both: tuple[Expr, Expr], down: Expr) -> None:
    for name, expr in zip(("gate_proj", "up_proj", "down_proj"), (*both, down), strict=True):
        at.rule(f"{name}.weight", expr, Kind.LINEAR)


def _dense(at: Mount, facts: Facts) -> None:
    hidden, inner = facts.size("hidden_size"), facts.size("dense_intermediate_size")
    down = at.input("w2_md.weight", hidden, inner)
    _gated(at, _halves(at.input("w13_dn.weight", 2 * inner, hidden)), down)
    at.tensor("global_scale", 1, kind=Kind.STATE)


def _experts(at: Mount, facts: Facts) -> None:
    hidden, inner = facts.size("hidden_size"), facts.size("intermediate_size")
    routed, shared = facts.size("n_routed_experts"), facts.size("n_shared_experts")
    at.rule("gate_weight", at.input("gate.weight", routed + shared, hidden), Kind.GATE)
    at.rule("e_score_correction_bias", at.input("gate.bias", routed), Kind.STATE)
    at.rule("global_scale", at.input("gate.global_scale", 1), Kind.STATE)
    each = _halves(at.input("experts.w13_weight", routed, 2 * inner, hidden))
    _gated(at / "switch_mlp", each, at.input("experts.w2_weight", routed, hidden, inner))
    for name in ("gate_scale", "out_scale"):  # which the runtime has for NVFP4 alone
        at.rule(f"switch_mlp.{name}", Constant((routed,), 1.0), Kind.STATE)
    both = at.input("shared_experts.shared_w13_weight", shared, 2 * inner, hidden)
    down = at.input("shared_experts.shared_w2_weight", shared, hidden, inner)
    beside = Reshape(Permute(down, (1, 0, 2)), (hidden, shared * inner))
    _gated(at / "shared_experts", _halves(both, joined=True), beside)


def _layer(at: Mount, facts: Facts, *, local: bool, sparse: bool) -> None:
    hidden, kernel = facts.size("hidden_size"), int(facts.size("sconv_kernel_size"))
    attention = at.at(source="attn", target="self_attn")
    _attention(attention, facts, _attention_sizes(facts, local=local))
    (_experts if sparse else _dense)(at / "mlp", facts)
    for name, ours in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
        at.rule(f"{ours}.weight", at.input(f"{name}_norm.weight", hidden), Kind.NORM)
        _short_conv(at, f"{name}_sconv", hidden, kernel)


def stack(at: Mount, head: Mount, facts: Facts) -> None:
    """Embedding and its norm, layers and the last norm below ``at``, the output beside."""
    vocab, hidden = facts.size("vocab_size"), facts.size("hidden_size")
    at.rule("embed_tokens.weight", at.input("embed.weight", vocab, hidden), Kind.EMBEDDING)
    at.norm("embed_norm", hidden)
    local, sparse = local_layers(facts), sparse_layers(facts)
    for index, layer in at.layers("layers", len(local)):
        _layer(layer, facts, local=local[index], sparse=sparse[index])
    at.norm("norm", hidden)
    head.rule("lm_head.weight", at.input("unembed.weight", vocab, hidden), Kind.HEAD)


def further(at: Mount, facts: Facts, *, local: bool) -> None:
    """A layer that predicts a further token from the last state and the token before it."""
    hidden = facts.size("hidden_size")
    at.linear("input_proj", hidden, 2 * hidden)
    at.norm("embed_norm", hidden)
    at.norm("hidden_norm", hidden)
    _layer(at / "transformer_block", facts, local=local, sparse=False)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the text's facts under every name that the runtime looks for, in place."""
    why = "the runtime computes it so for this type"
    for name, needed in (
        *(("use_embed_norm", True), ("use_sconv", True), ("use_gate_bias", True)),
        *(("use_global_scale", True), ("norm_after_topk", True), ("shared_expert_sink", True)),
        *(("q_bias", False), ("o_bias", False), ("tie_word_embeddings", False)),
    ):
        facts.expect(name, needed, default=needed, why=why)
    facts.expect("gate_activation", "sigmoid", default="sigmoid", why=why)
    facts.expect("final_logit_softcapping", None, default=None, why=why)
    llama.expect_silu(facts)
    vocab = int(facts.size("vocab_size"))
    local, sparse = local_layers(facts), sparse_layers(facts)
    floor = facts.data.get("log_scaling_n_floor")
    names = (
        *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim"),
        *("sliding_window_size", "d_rel", "rel_extent", "sconv_kernel_size"),
        *("intermediate_size", "dense_intermediate_size", "model_max_length"),
        *("n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    )
    config.update(
        {name: int(facts.size(name)) for name in names},
        model_type="inkling_text",
        num_hidden_layers=len(local),
        vocab_size=vocab,
        unpadded_vocab_size=int(facts.size("unpadded_vocab_size", vocab)),
        max_position_embeddings=int(facts.size("model_max_length")),
        conv_kernel_size=int(facts.size("sconv_kernel_size")),
        moe_intermediate_size=int(facts.size("intermediate_size")),
        layer_types=[_LOCAL if windowed else _GLOBAL for windowed in local],
        local_layer_ids=[index for index, windowed in enumerate(local) if windowed],
        mlp_layer_types=["sparse" if routed else "dense" for routed in sparse],
        dense_mlp_idx=sparse.index(True) if any(sparse) else len(sparse),
        log_scaling_n_floor=None if floor is None else int(facts.size("log_scaling_n_floor")),
        log_scaling_alpha=facts.number("log_scaling_alpha", 0.1),
        logits_mup_width_multiplier=facts.number("logits_mup_width_multiplier", 24.0),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        route_scale=facts.number("route_scale", 8.0),
        use_embed_norm=True,
        tie_word_embeddings=False,
    )
