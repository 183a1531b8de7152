"""K-EXAONE: windowed rotary layers, global layers without positions, sigmoid-routed experts."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.registry import ArchMap
from arch_maps.rules import Layout, Mount
from arch_maps.text import deepseek, llama, moe

_BIAS = {"gate.e_score_correction_bias": "e_score_correction_bias"}


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, kv_heads=32, qk_norm=True)


def _shared(facts: Facts) -> Facts:
    """The config with the shared experts' number under DeepSeek's name."""
    data = {**facts.data, "n_shared_experts": facts.data.get("num_shared_experts", 1)}
    return Facts(data, path=facts.path, parent=facts)


def _sparse(facts: Facts, layers: int) -> list[bool]:
    """Which layers have experts, as either generation of the config lists them."""
    kinds, flags = facts.data.get("mlp_layer_types"), facts.data.get("is_moe_layer")
    listed = [kind == "sparse" for kind in kinds] if kinds is not None else flags
    if listed is None:
        data = {"first_k_dense_replace": 1, **facts.data}
        return moe.dense_prefix(Facts(data, path=facts.path, parent=facts), layers)
    if len(listed) != layers:
        facts.problem(f"config.json: {facts.path}mlp_layer_types must list {layers} layers")
        return [True] * layers
    return [bool(value) for value in listed]


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s, shared = _sizes(facts), _shared(facts)
    e = deepseek.routed(facts, fused=layout.fused_experts)
    sparse = _sparse(facts, s.layers)

    def feed_forward(index: int, layer: Mount) -> None:
        if sparse[index]:
            deepseek.experts(layer / "mlp", shared, e)
        else:
            llama.gated_mlp(layer / "mlp", s.hidden, s.intermediate)

    moe.causal_lm(root, s, feed_forward)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out = spell.start(config)
    s = _sizes(facts)
    kinds = facts.data.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != s.layers or "sliding_attention" not in kinds:
        facts.problem(
            f"config.json: {facts.path}layer_types must list {s.layers} layers, some of them "
            "sliding_attention: the runtimes rotate no other layers"
        )
    types = ("default", "linear", "yarn", "llama3")
    moe.spell_config(out, facts, s, max_positions=2048, eps=1e-5, rope_types=types)
    deepseek.spell_routing(out, _shared(facts), dense=0)
    deepseek.sigmoid_routing(out, facts)
    out.update(
        num_shared_experts=facts.data.get("num_shared_experts", 1),
        routed_scaling_factor=facts.number("routed_scaling_factor", 2.5),
        sliding_window=int(facts.size("sliding_window", 4096)),
        is_moe_layer=_sparse(facts, s.layers),
    )
    return out


MAP = ArchMap(
    model_type="exaone_moe",
    tensors=_tensors,
    config=_config,
    layouts=(
        Layout("published", {}, _BIAS),
        Layout("fused experts", {}, fused_experts=True),
    ),
    runtimes=("mlx-vlm", "mlx-lm"),
    parts=("text.llama", "text.deepseek", "text.moe"),
)
