"""The Nemotron NAS text stack: Llama's layers with a size of their own each, some left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount
from arch_maps.text import llama


@dataclass(frozen=True, slots=True)
class Half:
    """A layer's attention or MLP: its size, or 0 where one matrix stands for it, or None."""

    size: float | None

    @property
    def linear(self) -> bool:
        """Whether one matrix stands for it."""
        return self.size == 0


def _half(facts: Facts, block: Any, name: str, size: str) -> Half:
    found = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(found, Mapping):
        facts.problem(f"config.json: every entry of block_configs must have the object {name}")
        return Half(None)
    if found.get("no_op"):
        return Half(None)
    if found.get("replace_with_linear"):
        return Half(0)
    if found.get("window_length") or found.get("num_sink_tokens") or found.get("sparsify"):
        facts.problem(f"config.json: block_configs: {name} has a window; the runtimes have none")
    value = found.get(size)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < (value or 0) <= 128:
        facts.problem(f"config.json: block_configs: {name}.{size} must be between 0 and 128")
        return Half(None)
    return Half(float(value or 0))


def blocks(facts: Facts, layers: int) -> list[tuple[Half, Half]]:
    """Attention and MLP of every layer, as block_configs lists them."""
    listed = facts.data.get("block_configs")
    if not isinstance(listed, list) or len(listed) != layers:
        facts.problem(f"config.json: block_configs must list {layers} layers")
        return []
    return [
        (_half(facts, b, "attention", "n_heads_in_group"), _half(facts, b, "ffn", "ffn_mult"))
        for b in listed
    ]


def _width(multiple: float, hidden: int) -> Dim:
    """Two thirds of the stated multiple of the hidden size, rounded up to 256."""
    width = int(2 * round(multiple, 6) * hidden / 3)
    return Dim(width + -width % 256, "ffn_mult*hidden_size*2/3")


def sizes(facts: Facts) -> llama.Sizes:
    """What the layers share; their MLPs and key heads have sizes of their own."""
    known = {**facts.data, "intermediate_size": 1, "num_key_value_heads": None}
    return llama.sizes(Facts(known, path=facts.path, parent=facts))


def _stand_in(at: Mount, source: str, hidden: Dim, *, bias: bool) -> None:
    """One matrix in the place of a whole attention or MLP."""
    at.rule("linear.weight", at.input(f"{source}.weight", hidden, hidden), Kind.LINEAR)
    if bias:
        at.rule("linear.bias", at.input(f"{source}.bias", hidden), Kind.BIAS)


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head."""
    s = sizes(facts)
    model = root / "model"
    model.embedding("embed_tokens", s.vocab, s.hidden)
    for index, (attention, mlp) in enumerate(blocks(facts, s.layers)):
        layer = model / f"layers.{index}"
        if attention.size is not None:
            layer.norm("input_layernorm", s.hidden)
        if attention.linear:
            _stand_in(layer / "self_attn", "linear_attn", s.hidden, bias=s.attention_bias)
        elif attention.size:
            groups = Dim(int(s.heads) // int(attention.size), "heads/n_heads_in_group")
            llama.attention(layer / "self_attn", replace(s, kv_heads=groups))
        if mlp.size is not None:
            layer.norm("post_attention_layernorm", s.hidden)
        if mlp.linear:
            _stand_in(layer / "mlp", "linear_mlp", s.hidden, bias=s.mlp_bias)
        elif mlp.size:
            wide = _width(mlp.size, int(s.hidden))
            llama.gated_mlp(layer / "mlp", s.hidden, wide, bias=s.mlp_bias)
    model.norm("norm", s.hidden)
    root.head("lm_head", s.vocab, s.hidden, tied_to="model.embed_tokens.weight" if s.tied else None)
