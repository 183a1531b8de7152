"""Nemotron-H's stack: each layer a Mamba-2 mixer, attention, an MLP or experts, as written."""

from __future__ import annotations

from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.ops import Stack
from arch_maps.rules import Kind, Mount
from arch_maps.text import deepseek, llama, mamba2, moe

_KINDS: Final = {
    **{"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"},
    **{"mlp": "-", "moe": "E"},
}
_DRAFTING: Final = "*E"
"""The reference's kinds of the layers that predict further tokens."""
_MTP: Final = (
    "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
)


def pattern(facts: Facts) -> str:
    """One letter per layer: M, *, - or E."""
    stated = facts.data.get("hybrid_override_pattern")
    kinds = facts.data.get("layers_block_type") or facts.data.get("layer_types") or []
    text = _letters(stated, kinds)
    if not text or set(text) - set("M*-E"):
        facts.problem(
            f"config.json: {facts.path}hybrid_override_pattern must be made of M, *, - and E"
        )
        return "M"
    return text


def _letters(stated: Any, kinds: Any) -> str:
    return "".join(_KINDS.get(kind, "?") for kind in kinds) if stated is None else "".join(stated)


def _mamba(facts: Facts) -> mamba2.Sizes:
    return mamba2.Sizes(
        hidden=facts.size("hidden_size"),
        heads=facts.size("mamba_num_heads", 128),
        head_dim=facts.size("mamba_head_dim", 64),
        groups=facts.size("n_groups", 8),
        state=facts.size("ssm_state_size", 128),
        kernel=facts.size("conv_kernel", 4),
        conv_bias=facts.flag("use_conv_bias", True),
        proj_bias=facts.flag("mamba_proj_bias", False),
    )


def _sizes(facts: Facts) -> llama.Sizes:
    data = {"num_hidden_layers": len(pattern(facts)), **facts.data}
    return llama.sizes(Facts(data, path=facts.path, parent=facts), kv_heads=8, head_dim=128)


def _mlp(at: Mount, hidden: int, inner: int, *, bias: bool) -> None:
    at.linear("up_proj", inner, hidden, bias=bias)
    at.linear("down_proj", hidden, inner, bias=bias)


def _experts(at: Mount, facts: Facts, s: llama.Sizes, *, fused: bool) -> None:
    """Routed experts without a gate, on the hidden size or on a latent one, and a shared one."""
    count = moe.expert_count(facts, 8)
    inner, width = facts.size("moe_intermediate_size", 7688), s.hidden
    at.linear("gate", count, s.hidden, kind=Kind.GATE)
    at.tensor("gate.e_score_correction_bias", count, kind=Kind.STATE)
    if facts.data.get("moe_latent_size") is not None:
        width = facts.size("moe_latent_size")
        at.linear("fc1_latent_proj", width, s.hidden, bias=s.mlp_bias)
        at.linear("fc2_latent_proj", s.hidden, width, bias=s.mlp_bias)
    for target, leaf, shape in (
        ("fc1", "up_proj", (inner, width)),
        ("fc2", "down_proj", (width, inner)),
    ):
        if fused:
            at.rule(
                f"switch_mlp.{target}.weight",
                at.input(f"experts.{leaf}", count, *shape),
                Kind.LINEAR,
            )
        else:
            each = (at.input(f"experts.{i}.{leaf}.weight", *shape) for i in range(count))
            at.rule(f"switch_mlp.{target}.weight", Stack(tuple(each)), Kind.LINEAR)
    shared = facts.size("moe_shared_expert_intermediate_size", 7688)
    _mlp(at / "shared_experts", s.hidden, shared, bias=s.mlp_bias)


def _layer(at: Mount, kind: str, facts: Facts, s: llama.Sizes, *, fused: bool) -> None:
    mixer = at / "mixer"
    if kind == "M":
        mamba2.mixer(mixer, _mamba(facts))
    elif kind == "*":
        llama.attention(mixer, s)
    elif kind == "-":
        _mlp(mixer, s.hidden, s.intermediate, bias=s.mlp_bias)
    else:
        _experts(mixer, facts, s, fused=fused)
    at.norm("norm", s.hidden)


def causal_lm(at: Mount, facts: Facts, *, model: str, fused: bool) -> None:
    """Embedding, layers, norm and head below ``at``, where the source calls its body ``model``."""
    s = _sizes(facts)
    body = at.at(source=model, target="backbone")
    body.embedding("embeddings", s.vocab, s.hidden)
    kinds = pattern(facts)
    for index, layer in body.layers("layers", len(kinds)):
        _layer(layer, kinds[index], facts, s, fused=fused)
    body.norm("norm_f", s.hidden)
    at.linear("lm_head", s.vocab, s.hidden, kind=Kind.HEAD)
    _drop_mtp(at / "mtp", facts, s, fused=fused)


def _drop_mtp(at: Mount, facts: Facts, s: llama.Sizes, *, fused: bool) -> None:
    """Layers that predict further tokens: each time ``kinds``, with what joins and what ends it."""
    if not facts.data.get("num_nextn_predict_layers"):
        return
    stated = facts.data.get("mtp_hybrid_override_pattern")
    kinds = _letters(stated, facts.data.get("mtp_layers_block_type") or []) or _DRAFTING
    if set(kinds) - set("M*-E"):
        facts.problem(
            f"config.json: {facts.path}mtp_hybrid_override_pattern must be made of M, *, - and E"
        )
        return
    for index in range(facts.count("num_nextn_predict_layers") * len(kinds)):
        place = index % len(kinds)

        def block(layer: Mount, place: int = place) -> None:
            _layer(layer, kinds[place], facts, s, fused=fused)
            if place == 0:
                layer.norm("enorm", s.hidden)
                layer.norm("hnorm", s.hidden)
                layer.linear("eh_proj", s.hidden, 2 * s.hidden)
            if place == len(kinds) - 1:
                layer.norm("final_layernorm", s.hidden)

        moe.drop_block(at, f"{at.source}.layers.{index}", block, _MTP)


def spell_config(out: dict[str, Any], facts: Facts) -> None:
    """Write the stack's facts under every name that the runtimes read, in place."""
    moe.untied(facts)
    facts.expect("mlp_hidden_act", "relu2", default="relu2", why="the runtimes compute relu^2")
    facts.expect("mamba_hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    s, mamba, kinds = _sizes(facts), _mamba(facts), pattern(facts)
    limits = out.get("time_step_limit") or [0.0, float("inf")]
    if "E" in kinds:
        moe_facts = Facts(
            {"num_experts_per_tok": 2, "moe_intermediate_size": 7688, **facts.data},
            path=facts.path,
            parent=facts,
        )
        facts.expect("n_shared_experts", 1, default=1, why="the reference has one shared expert")
        deepseek.spell_routing(out, moe_facts, dense=0)
        shared = int(facts.size("moe_shared_expert_intermediate_size", 7688))
        out.update(
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=shared,
            moe_latent_size=facts.data.get("moe_latent_size"),
        )
    named = {letter: kind for kind, letter in reversed(_KINDS.items())}
    eps = facts.number("layer_norm_epsilon", 1e-5)
    out.pop("layer_types", None)
    out.update(
        hybrid_override_pattern=kinds,
        layers_block_type=[named[letter] for letter in kinds],
        num_hidden_layers=len(kinds),
        intermediate_size=int(s.intermediate),
        head_dim=int(s.head_dim),
        num_key_value_heads=int(s.kv_heads),
        max_position_embeddings=int(facts.size("max_position_embeddings", 4096)),
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        use_bias=facts.flag("use_bias", False),
        use_conv_bias=mamba.conv_bias,
        mamba_proj_bias=mamba.proj_bias,
        mamba_num_heads=int(mamba.heads),
        mamba_head_dim=int(mamba.head_dim),
        n_groups=int(mamba.groups),
        ssm_state_size=int(mamba.state),
        conv_kernel=int(mamba.kernel),
        layer_norm_epsilon=eps,
        rms_norm_eps=eps,
        time_step_limit=[float(limit) for limit in limits],
        tie_word_embeddings=False,
    )
