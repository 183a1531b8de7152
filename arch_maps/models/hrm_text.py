"""HRM-Text: a low and a high stack that run in turns over one residual stream."""

from __future__ import annotations

from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts
from arch_maps.ops import Slice, Source
from arch_maps.registry import ArchMap
from arch_maps.rules import Kind, Layout, Mount
from arch_maps.text import llama


def _sizes(facts: Facts) -> llama.Sizes:
    return llama.sizes(facts, head_dim=128)


def _depth(facts: Facts) -> int:
    """Layers of a stack; where that is stated apart, num_hidden_layers counts every turn."""
    apart = facts.data.get("num_layers_per_stack") is not None
    return facts.count("num_layers_per_stack" if apart else "num_hidden_layers")


def _cut(at: Mount, fused: Source, names: tuple[str, ...]) -> None:
    """``fused`` cut along its rows into equal projections."""
    rows = int(fused.shape[0]) // len(names)
    leaf = fused.name.rpartition(".")[2]
    kind = Kind.LINEAR if leaf == "weight" else Kind.BIAS
    for index, name in enumerate(names):
        at.rule(f"{name}.{leaf}", Slice(fused, 0, index * rows, (index + 1) * rows), kind)


def _fused_layer(layer: Mount, s: llama.Sizes) -> None:
    """The attention's four projections in one tensor, and the MLP's gate and rise in another."""
    attention = layer.at(source="attn", target="self_attn")
    width = s.heads * s.head_dim
    names = ("gate_proj", "q_proj", "k_proj", "v_proj")
    _cut(attention, attention.input("gqkv_proj.weight", 4 * width, s.hidden), names)
    if s.attention_bias:
        _cut(attention, attention.input("gqkv_proj.bias", 4 * width), names)
    attention.linear("o_proj", s.hidden, width, bias=s.attention_bias)
    mlp = layer / "mlp"
    halves = ("gate_proj", "up_proj")
    _cut(mlp, mlp.input("gate_up_proj.weight", 2 * s.intermediate, s.hidden), halves)
    if s.mlp_bias:
        _cut(mlp, mlp.input("gate_up_proj.bias", 2 * s.intermediate), halves)
    mlp.linear("down_proj", s.hidden, s.intermediate, bias=s.mlp_bias)


def _tensors(root: Mount, facts: Facts, layout: Layout) -> None:
    s = _sizes(facts)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    model.tensor("z_L_init", s.hidden, kind=Kind.STATE)
    for stack in ("L_module", "H_module"):
        for _index, layer in (model / stack).layers("layers", _depth(facts)):
            if layout.name == "published":
                _fused_layer(layer, s)
                continue
            attention = layer / "self_attn"
            llama.attention(attention, s)
            attention.linear("gate_proj", s.heads * s.head_dim, s.hidden, bias=s.attention_bias)
            llama.mlp(layer / "mlp", s)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)


def _config(config: dict[str, Any], facts: Facts) -> dict[str, Any]:
    out, s = spell.start(config), _sizes(facts)
    llama.spell_config(out, facts, s, max_positions=2048, rope_types=("default",))
    high, low = int(facts.size("H_cycles", 2)), int(facts.size("L_cycles", 3))
    depth = _depth(facts)
    scale = 1 / facts.number("initializer_range", 0.02)
    out.update(
        num_key_value_heads=int(s.heads),
        attention_bias=s.attention_bias,
        mlp_bias=s.mlp_bias,
        H_cycles=high,
        L_cycles=low,
        L_bp_cycles=facts.data.get("L_bp_cycles") or [2],
        num_layers_per_stack=depth,
        num_hidden_layers=depth * high * (low + 1),
        embedding_scale=facts.number("embedding_scale", scale),
        prefix_lm=facts.flag("prefix_lm", True),
    )
    return out


MAP = ArchMap(
    model_type="hrm_text",
    tensors=_tensors,
    config=_config,
    layouts=(Layout("published", {}), Layout("in memory", {})),
    runtimes=("mlx-vlm",),
    parts=("text.llama",),
)
