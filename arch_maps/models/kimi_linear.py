"""Kimi Linear: delta attention, latent attention without positions, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, kda, llama, mla, moe

_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok",),
    "num_shared_experts": ("n_shared_experts",),
    "num_expert_group": ("n_group",),
    "model_max_length": ("max_position_embeddings",),
    "moe_renormalize": ("norm_topk_prob",),
}
"""The release's names of settings, and transformers 5's."""
_LINEAR = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}


def _released(facts: Facts) -> Facts:
    """The config under the release's names, whichever generation wrote it."""
    return kda.released(facts, _NAMES, linear_attn_config=_linear(facts))


def _linear(facts: Facts) -> dict[str, Any]:
    listed = facts.data.get("linear_attn_config")
    if isinstance(listed, dict):
        return listed
    kinds = facts.data.get("layer_types")
    if not isinstance(kinds, list):
        facts.problem("config.json states neither linear_attn_config nor layer_types")
        kinds = []
    return {
        "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"],
        "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"],
        **{name: facts.data.get(other) for name, other in _LINEAR.items()},
    }


def _kinds(facts: Facts) -> list[bool]:
    """Which layers have delta attention; both kinds must be there, and cover all layers."""
    linear, layers = facts.data["linear_attn_config"], facts.count("num_hidden_layers")
    delta, full = (linear.get(name) or [] for name in ("kda_layers", "full_attn_layers"))
    if sorted([*delta, *full]) != list(range(1, layers + 1)) or not delta or not full:
        facts.problem(
            f"config.json: {facts.path}linear_attn_config must give each of {layers} layers one "
            "kind, and both kinds layers"
        )
    return [index in delta for index in range(1, layers + 1)]


def _tensors(root: Mount, given: Facts, layout: Layout) -> None:
    facts = _released(given)
    for name, needed in (("q_lora_rank", None), ("attention_bias", False)):
        facts.expect(name, needed, default=needed, why="the runtimes have no such projection")
    delta, dense = _kinds(facts), deepseek.dense_first(facts, 1)
    s, latent = llama.sizes(facts), mla.sizes(facts)
    linear = facts.section("linear_attn_config")
    state = kda.Sizes(
        hidden=s.hidden,
        heads=linear.size("num_heads"),
        head_dim=linear.size("head_dim"),
        kernel=linear.size("short_conv_kernel_size", 4),
    )
    e = moe.Experts(
        count=facts.size("num_experts"),
        hidden=s.hidden,
        intermediate=facts.size("moe_intermediate_size"),
        fused=False,
        names=("w1", "w3", "w2"),
    )
    shared = facts.size("num_shared_experts") * e.intermediate
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        if delta[index]:
            kda.attention(layer / "self_attn", state)
        else:
            mla.attention(layer / "self_attn", latent)
        if index < dense:
            block = layer.at(source=layout["dense"], target="mlp")
            llama.gated_mlp(block, s.hidden, s.intermediate)
        else:
            block = layer.at(source=layout["experts"], target="mlp")
            block.linear("gate", e.count, s.hidden, kind=Kind.GATE)
            bias = block.input("gate.e_score_correction_bias", e.count)
            block.rule("e_score_correction_bias", bias, Kind.STATE)
            moe.experts(block, e)
            llama.gated_mlp(block / "shared_experts", s.hidden, shared)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    moe.untied(facts)
    root.head("lm_head", s.vocab, s.hidden, tied_to=None)


def _config(config: dict[str, Any], given: Facts) -> dict[str, Any]:
    facts = _released(given)
    why = "the reference has no other"
    facts.expect("moe_router_activation_func", "sigmoid", default="sigmoid", why=why)
    facts.expect("mla_use_nope", True, None, default=True, why="the reference has no positions")
    out = spell.start(config)
    latent, linear = mla.sizes(facts), facts.data["linear_attn_config"]
    mla.spell_config(out, latent)
    settings = spell.rope(facts)  # no layer rotates, but the runtimes ask for a base
    longest = int(facts.size("model_max_length", 1048576))
    out.update(
        num_key_value_heads=int(facts.size("num_key_value_heads", int(latent.heads))),
        head_dim=int(latent.rope),
        rope_theta=settings["rope_theta"],
        rope_scaling=None,
        rms_norm_eps=facts.number("rms_norm_eps", 1e-5),
        linear_attn_config={
            **linear,
            "short_conv_kernel_size": linear.get("short_conv_kernel_size") or 4,
        },
        layer_types=["linear_attention" if d else "full_attention" for d in _kinds(facts)],
        model_max_length=longest,
        max_position_embeddings=longest,
        num_experts=int(facts.size("num_experts")),
        num_local_experts=int(facts.size("num_experts")),
        num_experts_per_token=int(facts.size("num_experts_per_token")),
        num_experts_per_tok=int(facts.size("num_experts_per_token")),
        num_shared_experts=int(facts.size("num_shared_experts")),
        n_shared_experts=int(facts.size("num_shared_experts")),
        num_expert_group=int(facts.size("num_expert_group", 1)),
        n_group=int(facts.size("num_expert_group", 1)),
        topk_group=int(facts.size("topk_group", 1)),
        use_grouped_topk=True,
        moe_renormalize=facts.flag("moe_renormalize", True),
        norm_topk_prob=facts.flag("moe_renormalize", True),
        moe_router_activation_func="sigmoid",
        routed_scaling_factor=facts.number("routed_scaling_factor", 2.446),
        first_k_dense_replace=deepseek.dense_first(facts, 1),
        moe_layer_freq=1,
        mla_use_nope=True,
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="kimi_linear",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {"experts": "block_sparse_moe", "dense": "mlp"}),
        # Saving renames every MLP as it renames the experts.
        Layout("transformers 5", dict.fromkeys(("experts", "dense"), "block_sparse_moe")),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.kda", "text.mla", "text.moe"),
)
