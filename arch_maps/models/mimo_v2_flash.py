"""MiMo V2 Flash: windows with attention sinks beside full attention, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import deepseek, llama, moe, windows

_THETA, _WINDOW_THETA, _ROTATED = 5e6, 1e4, 0.334
_MTP = "multi-token-prediction layers are a drafter of their own, not part of this checkpoint"
_MTP_LAYERS = 3


def _kinds(facts: Facts, name: str, listed: str, one: str, other: str) -> list[bool]:
    """Which layers are ``one``, from 0 and 1 by the release's name or words by transformers'."""
    layers = facts.count("num_hidden_layers")
    words, flags = facts.data.get(listed), facts.data.get(name)
    if isinstance(words, list) and len(words) == layers and set(words) <= {one, other}:
        return [word == one for word in words]
    if isinstance(flags, list) and len(flags) == layers and set(flags) <= {0, 1}:
        return [flag == 1 for flag in flags]
    facts.problem(f"config.json: {facts.path}{name} must list {layers} layers as 0 or 1")
    return [False] * layers


def _windowed(facts: Facts) -> list[bool]:
    kinds = _kinds(facts, "hybrid_layer_pattern", "layer_types", windows.SLIDING, windows.FULL)
    if len(set(kinds)) != 2:
        facts.problem(f"config.json: {facts.path}layer_types must have both kinds of attention")
    return kinds


def _sparse(facts: Facts) -> list[bool]:
    return _kinds(facts, "moe_layer_freq", "mlp_layer_types", "sparse", "dense")


def _attention(at: Mount, facts: Facts, *, windowed: bool) -> None:
    hidden, heads = facts.size("hidden_size"), facts.size("num_attention_heads")
    kv_heads = facts.size("num_key_value_heads", 4) * (2 if windowed else 1)
    size, value = facts.size("head_dim", 192), facts.size("v_head_dim", 128)
    at.linear("q_proj", heads * size, hidden)
    at.linear("k_proj", kv_heads * size, hidden)
    at.linear("v_proj", kv_heads * value, hidden)
    at.linear("o_proj", hidden, heads * value)
    if windowed:
        at.tensor("attention_sink_bias", heads, kind=Kind.STATE)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    for name, needed in (("attention_bias", False), ("n_shared_experts", None)):
        facts.expect(name, needed, default=needed, why="the reference has none")
    s, e = llama.sizes(facts, head_dim=192), deepseek.routed(facts, fused=layout.fused_experts)
    windowed, sparse = _windowed(facts), _sparse(facts)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        _attention(layer / "self_attn", facts, windowed=windowed[index])
        if sparse[index]:
            deepseek.experts(layer / "mlp", facts, e)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)
        layer.norm("input_layernorm", s.hidden)
        layer.norm("post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    moe.untied(facts)
    root.head("lm_head", s.vocab, s.hidden, tied_to=None)
    for index in range(_MTP_LAYERS):
        _drop_mtp(root / f"model.mtp.layers.{index}", facts, s)


def _drop_mtp(at: Mount, facts: Facts, s: llama.Sizes) -> None:
    def block(place: Mount) -> None:
        _attention(place / "self_attn", facts, windowed=True)
        llama.gated_mlp(place / "mlp", s.hidden, s.intermediate)
        for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            place.norm(name, s.hidden)
        place.linear("eh_proj", s.hidden, 2 * s.hidden)

    moe.drop_block(at, at.source, block, _MTP)
    at.bind_drops("eh_proj.weight")


def _ropes(facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Position settings of full and windowed layers; transformers nests them by kind."""
    by_kind = facts.data.get("rope_parameters")
    if isinstance(by_kind, dict) and windows.FULL in by_kind:
        full, sliding = windows.rope_by_kind(facts, full_theta=_THETA, sliding_theta=_WINDOW_THETA)
    else:
        full = spell.rope(facts, default_theta=_THETA)
        theta = facts.number("swa_rope_theta", _WINDOW_THETA)
        part = {k: v for k, v in full.items() if k == "partial_rotary_factor"}
        sliding = {"rope_type": "default", "rope_theta": theta, **part}
    for settings in (full, sliding):
        settings.setdefault("partial_rotary_factor", _ROTATED)
        spell.require_rope_type(facts, settings, allowed=("default",))
    if full["partial_rotary_factor"] != sliding["partial_rotary_factor"]:
        facts.problem("config.json: rope_parameters must rotate the same part in both kinds")
    return full, sliding


def _window(facts: Facts) -> int:
    """Tokens that a window holds, the query's own included, as the runtimes count them.

    The release counts those before it, by a name that transformers reads first.
    """
    before = facts.data.get("sliding_window_size")
    if before is not None:
        return int(facts.size("sliding_window_size")) + 1
    return int(facts.size("sliding_window", 129))


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    llama.expect_silu(facts)
    why = "the reference has sinks in windows only"
    facts.expect("add_swa_attention_sink_bias", True, default=True, why=why)
    facts.expect("add_full_attention_sink_bias", False, default=False, why=why)
    heads, kv = int(facts.size("num_attention_heads")), int(facts.size("num_key_value_heads", 4))
    size, value = int(facts.size("head_dim", 192)), int(facts.size("v_head_dim", 128))
    swa = {
        "swa_num_attention_heads": heads,
        "swa_num_key_value_heads": 2 * kv,
        "swa_head_dim": size,
        "swa_v_head_dim": value,
    }
    for name, needed in swa.items():
        facts.expect(name, needed, default=needed, why="the reference derives it")
    full, sliding = _ropes(facts)
    scale = facts.data.get("attention_value_scale", 0.707)
    deepseek.sigmoid_routing(out, facts)
    deepseek.spell_routing(out, facts, dense=0)
    eps = facts.number("layernorm_epsilon", 1e-5)
    window = _window(facts)
    out.update(
        swa,
        head_dim=size,
        v_head_dim=value,
        num_key_value_heads=kv,
        hybrid_layer_pattern=[int(kind) for kind in _windowed(facts)],
        moe_layer_freq=[int(kind) for kind in _sparse(facts)],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=window,
        sliding_window=window,
        layernorm_epsilon=facts.number("rms_norm_eps", eps),
        rope_theta=full["rope_theta"],
        swa_rope_theta=sliding["rope_theta"],
        rope_scaling=None,
        rope_parameters={windows.FULL: full, windows.SLIDING: sliding},
        partial_rotary_factor=full["partial_rotary_factor"],
        attention_value_scale=scale,
        max_position_embeddings=int(facts.size("max_position_embeddings", 131072)),
        n_shared_experts=None,
        tie_word_embeddings=False,
    )
    return out


MAP = ArchMap(
    model_type="mimo_v2_flash",
    tensors=_tensors,
    config=_config,
    layouts=moe.LAYOUTS,
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.deepseek", "text.moe"),
)
