"""Ling 3 (Bailing V3): delta attention, gated latent attention every few layers, experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, kda, llama, mla, moe

_NAMES = {
    "num_experts": ("num_local_experts",),
    "num_experts_per_tok": ("num_experts_per_token",),
    "num_shared_experts": ("n_shared_experts",),
    "n_group": ("num_expert_group",),
    "max_position_embeddings": ("model_max_length",),
    "norm_topk_prob": ("moe_renormalize",),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}
"""The release's names of settings, and transformers 5's."""
_RUNTIME_CLASS = "BailingMoeV3ForCausalLM"
"""The class by which mlx-lm tells this architecture from an earlier one of the same type."""


def _delta(facts: Facts) -> list[bool]:
    """Which layers have delta attention: all but the last of each group."""
    layers, every = facts.count("num_hidden_layers"), int(facts.size("layer_group_size", 6))
    kinds = [(index + 1) % every != 0 for index in range(layers)]
    named = ["linear_attention" if kind else "full_attention" for kind in kinds]
    if layers % every or facts.data.get("layer_types") not in (None, named):
        facts.problem(
            f"config.json: {facts.path}layer_types must have latent attention in the last of every "
            f"{every} layers, and no layers beyond the last group"
        )
    return kinds


def _latent(at: Mount, s: mla.Sizes) -> None:
    at.linear("q_proj", s.heads * (s.nope + s.rope), s.hidden)
    at.linear("kv_a_proj_with_mqa", s.kv_rank + s.rope, s.hidden)
    at.norm("kv_a_layernorm", s.kv_rank)
    mla.per_head(at, s)
    at.linear("g_proj", s.heads, s.hidden, kind=Kind.GATE)
    at.linear("dense", s.hidden, s.heads * s.value)


def _state(facts: Facts) -> kda.Sizes:
    own = "linear_head_dim" if facts.data.get("linear_head_dim") is not None else "head_dim"
    return kda.Sizes(
        hidden=facts.size("hidden_size"),
        heads=facts.size("num_attention_heads"),
        head_dim=facts.size(own, 128),
        kernel=facts.size("short_conv_kernel_size", 4),
    )


def _tensors(root: Mount, given: Facts, _: Layout) -> None:
    facts = kda.released(given, _NAMES)
    facts.expect("q_lora_rank", None, default=None, why="the reference makes queries directly")
    vocab, hidden = facts.size("vocab_size"), facts.size("hidden_size")
    e = moe.Experts(
        count=facts.size("num_experts"),
        hidden=hidden,
        intermediate=facts.size("moe_intermediate_size"),
        fused=False,
    )
    delta, dense, latent = _delta(facts), deepseek.dense_first(facts, 2), mla.sizes(facts)

    def routed(layer: Mount) -> None:
        block = layer / "mlp"
        block.linear("gate", e.count, hidden, kind=Kind.GATE)
        block.tensor("gate.expert_bias", e.count, kind=Kind.STATE)
        moe.experts(block, e)
        shared = facts.size("num_shared_experts", 1) * e.intermediate
        llama.gated_mlp(block / "shared_experts", hidden, shared)
        for name in ("input_layernorm", "post_attention_layernorm"):
            layer.norm(name, hidden)

    model = root / "model"
    model.embedding("word_embeddings", vocab, hidden)
    for index, layer in model.layers("layers", len(delta)):
        if delta[index]:
            kda.direct_attention(layer / "attention", _state(facts))
        else:
            _latent(layer / "attention", latent)
        if index >= dense:
            routed(layer)
        else:
            llama.gated_mlp(layer / "mlp", hidden, facts.size("intermediate_size"))
            for name in ("input_layernorm", "post_attention_layernorm"):
                layer.norm(name, hidden)
    model.norm("norm", hidden)
    moe.untied(facts)
    root.head("lm_head", vocab, hidden, tied_to=None)

    def further(at: Mount) -> None:
        _latent(at / "attention", latent)
        routed(at)
        for name in ("enorm", "hnorm", "final_layernorm"):
            at.norm(name, hidden)
        at.linear("eh_proj", hidden, 2 * hidden)

    if facts.data.get("num_nextn_predict_layers"):
        for index in range(len(delta), len(delta) + facts.count("num_nextn_predict_layers")):
            moe.drop_block(root, f"model.layers.{index}", further, deepseek.MTP)
            (root / f"model.layers.{index}").bind_drops("eh_proj.weight")


def _config(config: dict[str, Any], given: Facts) -> dict[str, Any]:
    facts = kda.released(given, _NAMES)
    why = "the runtime computes it so for this type"
    for name in ("kda_safe_gate", "no_kda_lora", "rope_interleave", "norm_topk_prob"):
        facts.expect(name, True, default=True, why=why)
    wide = int(facts.size("moe_intermediate_size"))
    shared = facts.data.get("moe_shared_expert_intermediate_size")
    if shared not in (None, wide):
        facts.problem(
            f"config.json: {facts.path}moe_shared_expert_intermediate_size is {shared!r}; the "
            f"reference takes moe_intermediate_size ({wide})"
        )
    out = spell.start(config)
    deepseek.spell_latent(out, facts, max_positions=262144)
    deepseek.spell_rope(out, facts, theta=6e6)
    deepseek.spell_routing(out, facts, dense=deepseek.dense_first(facts, 2))
    state, shared_count = _state(facts), int(facts.size("num_shared_experts", 1))
    out.update(
        architectures=[_RUNTIME_CLASS],
        head_dim=int(state.head_dim),
        linear_head_dim=int(state.head_dim),
        short_conv_kernel_size=int(state.kernel),
        layer_group_size=int(facts.size("layer_group_size", 6)),
        kda_lower_bound=facts.number("kda_lower_bound", -5.0),
        kda_safe_gate=True,
        no_kda_lora=True,
        rope_interleave=True,
        moe_shared_expert_intermediate_size=wide,
        num_shared_experts=shared_count,
        n_shared_experts=shared_count,
        routed_scaling_factor=facts.number("routed_scaling_factor", 2.5),
        n_group=int(facts.size("n_group", 8)),
        topk_group=int(facts.size("topk_group", 4)),
    )
    return out


MAP = ArchMap(
    model_type="bailing_hybrid",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {}),
        # Saving renames the output of both kinds of attention as it renames the latent one's.
        Layout("transformers 5", {}, {"attention.o_proj.weight": "attention.dense.weight"}),
    ),
    runtimes=("mlx-lm",),
    parts=("text.kda", "text.mla", "text.moe"),
)
