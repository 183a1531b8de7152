"""Granite 4 Vision's projectors: within each window of patches, fewer queries attend to all."""

from __future__ import annotations

from arch_maps.facts import Dim, Facts
from arch_maps.rules import Kind, Mount


def sides(root: Facts) -> tuple[int, int]:
    """Queries and patches along a window's side, as ``downsample_rate`` says: "4/8"."""
    rate = root.data.get("downsample_rate")
    parts = rate.split("/") if isinstance(rate, str) else []
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        root.problem(f"config.json: downsample_rate must be like '4/8', not {rate!r}")
        return 1, 1
    return int(parts[0]), int(parts[1])


def projector(at: Mount, root: Facts, vision_hidden: Dim, text_hidden: int) -> None:
    """Norm, queries, positions, one Q-Former layer and the way to the text's width."""
    queries, patches = sides(root)
    at.norm("norm", vision_hidden, bias=True)
    at.tensor("query", 1, queries**2, vision_hidden, kind=Kind.POSITION)
    at.tensor("image_positions", 1, patches**2, vision_hidden, kind=Kind.POSITION)
    at.linear("out_linear", text_hidden, vision_hidden, bias=True)
    former = at / "qformer"
    former.norm("layernorm", vision_hidden, bias=True)
    layer = former / "encoder.layer.0"
    for attention in ("attention", "crossattention"):
        for name in ("query", "key", "value"):
            layer.linear(f"{attention}.attention.{name}", vision_hidden, vision_hidden, bias=True)
        _closing(layer / f"{attention}.output", vision_hidden, vision_hidden)
    layer.linear("intermediate_query.dense", INNER, vision_hidden, bias=True)
    _closing(layer / "output_query", vision_hidden, INNER)


INNER = Dim(3072, "qformer_config.intermediate_size")
"""Width of the Q-Former's MLP, fixed in the runtime's code."""


def _closing(at: Mount, hidden: int, inp: int) -> None:
    at.linear("dense", hidden, inp, bias=True)
    at.norm("LayerNorm", hidden, bias=True)


def expect_fixed(root: Facts, vision_hidden: int) -> None:
    """The Q-Former's sizes, which the runtime has in its code."""
    stated = root.data.get("qformer_config")
    if stated is None:
        return
    facts = root.section("qformer_config")
    why = "the runtime has this size in its code"
    facts.expect("num_hidden_layers", 1, default=1, why=why)
    facts.expect("intermediate_size", int(INNER), default=int(INNER), why=why)
    facts.expect("cross_attention_frequency", 1, default=1, why=why)
    facts.expect("hidden_size", vision_hidden, default=vision_hidden, why=why)
    facts.expect("hidden_act", "gelu", default="gelu", why="the runtime computes GELU")
