"""The OpenELM text stack: layers that differ in their heads and in their MLP's width."""

from __future__ import annotations

from dataclasses import dataclass

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount


@dataclass(frozen=True, slots=True)
class Layer:
    """What the shapes of one layer depend on."""

    heads: int
    kv_heads: int
    inner: Dim


def layers(facts: Facts) -> list[Layer]:
    """The layers as the config's lists say."""
    count = facts.count("num_transformer_layers")
    names = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    lists = [facts.data.get(name) for name in names]
    for name, found in zip(names, lists, strict=True):
        numbers = isinstance(found, list) and all(type(v) in (int, float) for v in found)
        if not numbers or len(found or ()) != count or min(found or (0,)) <= 0:
            facts.problem(f"config.json: {name} must list {count} positive numbers")
            return []
    width, step = int(facts.size("model_dim")), int(facts.size("ffn_dim_divisor", 256))
    return [
        Layer(int(heads), int(kv), _divisible(multiple * width, step))
        for heads, kv, multiple in zip(*(found or () for found in lists), strict=True)
    ]


def _divisible(value: float, step: int) -> Dim:
    """The multiple of ``step`` nearest to ``value``, but not under nine tenths of it."""
    nearest = max(step, int(value + step / 2) // step * step)
    return Dim(nearest + step if nearest < 0.9 * value else nearest, "ffn_multiplier*model_dim")


def causal_lm(root: Mount, facts: Facts) -> None:
    """Table, layers, final norm and head."""
    width, vocab, head_dim = (facts.size(n) for n in ("model_dim", "vocab_size", "head_dim"))
    at = root / "transformer"
    at.embedding("token_embeddings", vocab, width)
    for index, size in enumerate(layers(facts)):
        layer = at / f"layers.{index}"
        heads = size.heads + 2 * size.kv_heads
        layer.linear("attn.qkv_proj", heads * head_dim, width)
        layer.linear("attn.out_proj", width, size.heads * head_dim)
        if facts.flag("normalize_qk_projections", False):
            layer.norm("attn.q_norm", head_dim)
            layer.norm("attn.k_norm", head_dim)
        layer.linear("ffn.proj_1", 2 * size.inner, width)
        layer.linear("ffn.proj_2", width, size.inner)
        layer.norm("attn_norm", width)
        layer.norm("ffn_norm", width)
    at.norm("norm", width)
    if facts.flag("share_input_output_layers", False):
        root.head("lm_head", vocab, width, tied_to="transformer.token_embeddings.weight")
    else:
        root.linear("lm_head", vocab, width, kind=Kind.HEAD)
