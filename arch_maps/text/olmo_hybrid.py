"""The OLMo Hybrid text stack: OLMo 2's attention layers among gated delta nets."""

from __future__ import annotations

from dataclasses import replace

from arch_maps.facts import Dim, Facts
from arch_maps.ops import Permute, Slice
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama

_FULL, _LINEAR = "full_attention", "linear_attention"


def filled(facts: Facts) -> Facts:
    """The config with the delta net's derived sizes."""
    heads = int(facts.size("num_attention_heads"))
    keys = int(facts.size("linear_num_key_heads", heads))
    head_dim = int(0.75 * int(facts.size("hidden_size")) / keys) or 1
    head_dim = int(facts.size("linear_key_head_dim", head_dim))
    derived = {"linear_num_key_heads": keys, "linear_num_value_heads": heads}
    widths = {"linear_key_head_dim": head_dim, "linear_value_head_dim": 2 * head_dim}
    return facts.filled({**derived, **widths, "linear_conv_kernel_dim": 4})


def sizes(facts: Facts) -> llama.Sizes:
    """The attention layers' sizes."""
    found = llama.sizes(facts, qk_norm=True)
    return replace(found, wide_qk_norm=True, mlp_bias=False)


def layer_types(facts: Facts, layers: int) -> list[str]:
    """The kinds of the layers; every fourth is attention where they are not listed."""
    kinds = facts.data.get("layer_types")
    if kinds is None:
        kinds = [_FULL if index % 4 == 3 else _LINEAR for index in range(layers)]
        if _FULL not in kinds:
            kinds[-1] = _FULL
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {_FULL, _LINEAR}:
        facts.problem(f"config.json: layer_types must list {layers} layers as {_FULL} or {_LINEAR}")
        return [_FULL] * layers
    return list(kinds)


def _delta_net(at: Mount, facts: Facts, hidden: Dim, *, fused: bool) -> None:
    """Separate projections and convolutions of queries, keys and values; gates; recurrence."""
    heads, kernel = facts.size("linear_num_value_heads"), facts.size("linear_conv_kernel_dim")
    keys = facts.size("linear_num_key_heads") * facts.size("linear_key_head_dim")
    value = facts.size("linear_value_head_dim")
    widths = {"q": keys, "k": keys, "v": heads * value}
    joint, start = at.input("conv1d.weight", 2 * keys + heads * value, 1, kernel), 0
    for name, width in widths.items():
        at.linear(f"{name}_proj", width, hidden)
        if fused:
            part = Permute(Slice(joint, 0, start, start + int(width)), (0, 2, 1))
            at.rule(f"{name}_conv1d.weight", part, Kind.CONV)
        else:
            at.conv(f"{name}_conv1d", width, 1, kernel)
        start += int(width)
    at.linear("a_proj", heads, hidden, kind=Kind.GATE)
    at.linear("b_proj", heads, hidden, kind=Kind.GATE)
    at.linear("g_proj", heads * value, hidden)
    at.linear("o_proj", hidden, heads * value)
    at.tensor("A_log", heads, kind=Kind.STATE)
    at.tensor("dt_bias", heads, kind=Kind.STATE)
    at.norm("o_norm", value)


def _norm(layer: Mount, source: str, target: str, hidden: Dim) -> None:
    layer.rule(f"{target}.weight", layer.input(f"{source}.weight", hidden), Kind.NORM)


def causal_lm(root: Mount, facts: Facts, layout: Layout) -> None:
    """Table, layers, final norm and head."""
    facts = filled(facts)
    s = sizes(facts)
    kinds = layer_types(facts, s.layers)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, layer in model.layers("layers", s.layers):
        llama.mlp(layer / "mlp", s)
        if kinds[index] == _FULL:
            llama.attention(layer / "self_attn", s)
            _norm(layer, layout["full norm"], "post_attention_layernorm", s.hidden)
            layer.norm("post_feedforward_layernorm", s.hidden)
            continue
        fused = layout.name == "in memory"
        _delta_net(layer / "linear_attn", facts, s.hidden, fused=fused)
        _norm(layer, layout["first norm"], "input_layernorm", s.hidden)
        _norm(layer, layout["second norm"], "post_attention_layernorm", s.hidden)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)
