"""Hyper-connections: a residual of several streams, which each block reads and writes by weights.

The weights follow from the streams themselves: a projection ``fn``, and a scale and a base for each
of its three parts (what the block reads, what its output adds, how the streams mix).
"""

from __future__ import annotations

from typing import Any

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount


def connections(layer: Mount, facts: Facts) -> None:
    """How the streams are read and written around a layer's attention and feed-forward block."""
    streams = int(facts.size("hc_mult", 4))
    rows = streams * (2 + streams)
    for block in ("attn", "ffn"):
        for name, shape in (
            ("fn", (rows, streams * facts.size("hidden_size"))),
            ("base", (rows,)),
            ("scale", (3,)),
        ):
            found = layer.input(f"hc_{block}_{name}", *shape)
            layer.rule(f"{block}_hc.{name}", found, Kind.STATE)


def spell_config(config: dict[str, Any], facts: Facts) -> None:
    """Write the streams' facts as the runtime reads them, in place."""
    config.update(
        hc_mult=int(facts.size("hc_mult", 4)),
        hc_eps=facts.number("hc_eps", 1e-6),
        hc_sinkhorn_iters=int(facts.size("hc_sinkhorn_iters", 20)),
    )
