"""The DeepSeek text stack: dense first layers, then sigmoid-routed experts with shared ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama, mla, moe

MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"


def routed(facts: Facts, *, fused: bool) -> moe.Experts:
    """The routed experts of a config."""
    return moe.Experts(
        count=moe.expert_count(facts),
        hidden=facts.size("hidden_size"),
        intermediate=facts.size("moe_intermediate_size"),
        fused=fused,
    )


def experts(
    at: Mount,
    facts: Facts,
    e: moe.Experts,
    *,
    correction: bool = True,
    target: str = "switch_mlp",
    shared_mlp: Callable[[Mount, int, int], None] = llama.gated_mlp,
) -> None:
    """Router with its correction of the choice, routed experts and the shared ones as one."""
    at.linear("gate", e.count, e.hidden, kind=Kind.GATE)
    if correction:
        at.tensor("gate.e_score_correction_bias", e.count, kind=Kind.STATE)
    moe.experts(at, e, target=target)
    if facts.data.get("n_shared_experts"):
        shared = facts.size("n_shared_experts") * e.intermediate
        shared_mlp(at / "shared_experts", e.hidden, shared)


def latent_lm(
    root: Mount,
    facts: Facts,
    sparse: Sequence[bool],
    *,
    fused: bool,
    absorbed: bool = True,
    correction: bool = True,
    indexer: moe.FeedForward | None = None,
    called: str = "layers",
) -> None:
    """A text-only release with latent attention; ``sparse`` says which layers have experts.

    ``indexer`` adds what chooses the tokens that a layer attends to, given its index and mount;
    ``called`` is the source's name for the layers.
    """
    s, latent, e = llama.sizes(facts), mla.sizes(facts), routed(facts, fused=fused)

    def attention(at: Mount, _: llama.Sizes) -> None:
        mla.attention(at, latent, absorbed=absorbed)

    def feed_forward(index: int, layer: Mount) -> None:
        if indexer is not None:
            indexer(index, layer)
        if index >= s.layers or sparse[index]:
            experts(layer / "mlp", facts, e, correction=correction)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.causal_lm(root, s, feed_forward, attention=attention, called=called)
    further = partial(feed_forward, s.layers)  # the layers after the last have experts
    drop_mtp(root, facts, s.layers, lambda at: moe.layer(at, s, further, attention))


def drop_mtp(
    root: Mount, facts: Facts, layers: int, block: moe.Block, *, stack: str = "model"
) -> None:
    """Leave out the source's layers after the last of ``stack``, which predict further tokens."""
    hidden, vocab = facts.size("hidden_size"), facts.size("vocab_size")
    more = facts.count("num_nextn_predict_layers") if mtp_layers(facts) else 0
    for index in range(layers, layers + more):
        at = root / f"{stack}.layers.{index}"
        at.drop("embed_tokens.weight", MTP, vocab, hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            at.drop(f"{name}.weight", MTP, hidden)
        at.drop("eh_proj.weight", MTP, hidden, 2 * hidden)
        at.drop("shared_head.head.weight", MTP, vocab, hidden)
        moe.drop_block(root, f"{stack}.layers.{index}", block, MTP)
        at.bind_drops("eh_proj.weight")


def dense_first(facts: Facts, default: int) -> int:
    """Dense first layers, as ``mlp_layer_types`` lists or ``first_k_dense_replace`` counts them."""
    kinds = facts.data.get("mlp_layer_types")
    if kinds is None:
        stated = facts.data.get("first_k_dense_replace", default)
        return int(facts.size("first_k_dense_replace", default)) if stated else 0
    dense = int(kinds.count("dense"))
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        facts.problem(
            f"config.json: {facts.path}mlp_layer_types must name the dense layers first; the "
            "runtimes have them nowhere else"
        )
    return dense


def mtp_layers(facts: Facts) -> bool:
    """Whether the config announces further-token layers."""
    return bool(facts.data.get("num_nextn_predict_layers"))


def spell_routing(
    config: dict[str, Any], facts: Facts, *, dense: int, normalised: bool = True
) -> None:
    """Write how tokens are routed, in place; ``dense`` first layers have no experts.

    ``normalised`` is the reference's default of ``norm_topk_prob``.
    """
    count = moe.expert_count(facts)
    groups = int(facts.size("n_group", 1))
    moe.spell_expert_count(config, count)
    config.update(
        n_shared_experts=facts.data.get("n_shared_experts"),
        routed_scaling_factor=facts.number("routed_scaling_factor", 1.0),
        num_experts_per_tok=int(facts.size("num_experts_per_tok")),
        n_group=groups,
        topk_group=int(facts.size("topk_group", 1)),
        norm_topk_prob=facts.flag("norm_topk_prob", normalised),
        moe_intermediate_size=int(facts.size("moe_intermediate_size")),
        first_k_dense_replace=dense,
        moe_layer_freq=1,
    )
    if int(count) % groups:
        facts.problem(
            f"config.json: {facts.path}n_group ({groups}) must divide the {int(count)} experts"
        )


def sigmoid_routing(config: dict[str, Any], facts: Facts) -> None:
    """Require and write the sigmoid router with a correction bias."""
    why = "the runtimes compute a corrected sigmoid router for this type"
    facts.expect("scoring_func", "sigmoid", default="sigmoid", why=why)
    facts.expect("topk_method", "noaux_tc", default="noaux_tc", why=why)
    config.update(scoring_func="sigmoid", topk_method="noaux_tc")
    if facts.data.get("num_experts_per_tok") == 1 and facts.flag("norm_topk_prob", True):
        facts.problem(
            f"config.json: {facts.path}num_experts_per_tok is 1: the runtimes do not normalise a "
            "single expert's weight, the reference does"
        )


def spell_rope(config: dict[str, Any], facts: Facts, *, theta: float = 10000.0) -> None:
    """Write plain or YaRN positions, with every YaRN setting spelled out, in place."""
    settings = spell.rope(facts, default_theta=theta)
    moe.require_rope(facts, settings, ("default", "yarn"))
    config.update(spell.spell_rope(settings))


def spell_latent(
    config: dict[str, Any], facts: Facts, *, max_positions: int, eps: float = 1e-6
) -> None:
    """Write what the stack with latent attention has besides its routing, in place."""
    moe.untied(facts)
    facts.expect("hidden_act", "silu", default="silu", why="the runtimes compute SiLU")
    why = "the runtimes rotate neighbouring pairs"
    facts.expect("rope_interleave", True, default=True, why=why)
    facts.expect("moe_layer_freq", 1, default=1, why="the reference reads no such key")
    mla.spell_config(config, mla.sizes(facts))
    heads = int(facts.size("num_attention_heads"))
    config.update(
        num_key_value_heads=int(facts.size("num_key_value_heads", heads)),
        rms_norm_eps=facts.number("rms_norm_eps", eps),
        max_position_embeddings=int(facts.size("max_position_embeddings", max_positions)),
        tie_word_embeddings=False,
    )
