"""Granite 4: Mamba-2 and attention layers, with routed experts beside a shared MLP or without."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Slice
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import granite, llama, mamba2, moe


def _experts(facts: Facts) -> int:
    """Routed experts; none in the dense releases."""
    stated = facts.data.get("num_local_experts", 8)
    return int(moe.expert_count(facts, 8)) if stated else 0


def _kinds(facts: Facts) -> list[str]:
    layers = facts.count("num_hidden_layers")
    kinds = facts.data.get("layer_types") or facts.data.get("layers_block_type")
    if not isinstance(kinds, list) or len(kinds) != layers:
        facts.problem(f"config.json: {facts.path}layer_types must list {layers} layers' kinds")
        return ["attention"] * layers
    spelled = {"linear_attention": "mamba", "full_attention": "attention"}
    return [spelled.get(kind) or kind for kind in kinds]


def _mamba(facts: Facts) -> mamba2.Sizes:
    hidden, heads = facts.size("hidden_size"), facts.size("mamba_n_heads", 128)
    derived = int(facts.size("mamba_expand", 2)) * int(hidden) // int(heads)
    stated = facts.data.get("mamba_d_head", "auto")
    return mamba2.Sizes(
        hidden=hidden,
        heads=heads,
        head_dim=derived if stated in ("auto", None) else facts.size("mamba_d_head"),
        groups=facts.size("mamba_n_groups", 1),
        state=facts.size("mamba_d_state", 256),
        kernel=facts.size("mamba_d_conv", 4),
        conv_bias=facts.flag("mamba_conv_bias", True),
        proj_bias=facts.flag("mamba_proj_bias", False),
    )


def _dense(layer: Mount, s: llama.Sizes, inner: int) -> None:
    """The shared MLP alone, which the runtimes then hold as three projections."""
    at = layer.at(source="shared_mlp", target="mlp")
    both = at.input("input_linear.weight", 2 * inner, s.hidden)
    at.rule("gate_proj.weight", Slice(both, 0, 0, int(inner)), Kind.LINEAR)
    at.rule("up_proj.weight", Slice(both, 0, int(inner), 2 * int(inner)), Kind.LINEAR)
    down = at.input("output_linear.weight", s.hidden, inner)
    at.rule("down_proj.weight", down, Kind.LINEAR)


def _tensors(root: Mount, facts: Facts, _: Layout) -> None:
    s, kinds, mamba = llama.sizes(facts), _kinds(facts), _mamba(facts)
    count, shared = _experts(facts), facts.size("shared_intermediate_size", 1024)
    routed = moe.Experts(count=count, hidden=s.hidden, intermediate=s.intermediate, fused=True)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        if kinds[index] == "mamba":
            mamba2.mixer(layer / "mamba", mamba)
        else:
            llama.attention(layer / "self_attn", s)
        if count:
            block = layer / "block_sparse_moe"
            block.linear("router.layer", count, s.hidden, kind=Kind.GATE)
            moe.experts(block, routed)
            layer.linear("shared_mlp.input_linear", 2 * shared, s.hidden)
            layer.linear("shared_mlp.output_linear", s.hidden, shared)
        else:
            _dense(layer, s, shared)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s, mamba, kinds, count = llama.sizes(facts), _mamba(facts), _kinds(facts), _experts(facts)
    facts.expect("mamba_n_groups", 1, default=1, why="the runtimes norm all groups as one")
    limits = out.get("time_step_limit") or [0.0, float("inf")]
    moe.spell_config(out, facts, s, max_positions=2048)
    moe.spell_expert_count(out, count)
    shared = int(facts.size("shared_intermediate_size", 1024))
    out.update(
        layer_types=kinds,
        layers_block_type=kinds,
        intermediate_size=int(s.intermediate) if count else shared,
        shared_intermediate_size=shared,
        num_experts_per_tok=facts.data.get("num_experts_per_tok", 2),
        attention_bias=s.attention_bias,
        mlp_bias=False,
        position_embedding_type=facts.data.get("position_embedding_type") or "nope",
        embedding_multiplier=facts.number("embedding_multiplier", 1.0),
        attention_multiplier=facts.number("attention_multiplier", 1.0),
        residual_multiplier=facts.number("residual_multiplier", 1.0),
        logits_scaling=facts.number("logits_scaling", 1.0),
        mamba_n_heads=int(mamba.heads),
        mamba_d_head=int(mamba.head_dim),
        mamba_d_state=int(mamba.state),
        mamba_d_conv=int(mamba.kernel),
        mamba_n_groups=int(mamba.groups),
        mamba_conv_bias=mamba.conv_bias,
        mamba_proj_bias=mamba.proj_bias,
        time_step_limit=[float(limit) for limit in limits],
    )
    return out


MAP = ArchMap(
    model_type="granitemoehybrid",
    tensors=_tensors,
    config=_config,
    layouts=granite.EXPERT_LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.mamba2", "text.moe"),
)
