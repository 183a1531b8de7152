"""Stacks that mix full attention with sliding windows: what each layer does, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arch_maps import config as spell
from arch_maps.facts import Facts

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(facts: Facts, layers: int, *, pattern: int) -> list[str]:
    """The listed kinds of the layers, or full attention at every ``pattern``-th one."""
    by_pattern = [SLIDING if (index + 1) % pattern else FULL for index in range(layers)]
    kinds = facts.data.get("layer_types")
    if kinds is None:
        return by_pattern
    known = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    if not known or len(kinds) != layers:
        facts.problem(
            f"config.json: {facts.path}layer_types must list {layers} layers as {FULL} or {SLIDING}"
        )
        return by_pattern
    return list(kinds)


def interval(facts: Facts, kinds: Sequence[str]) -> int:
    """The n of "every n-th layer attends to everything"; anything else is a problem."""
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    every = full[0] + 1 if full else 1
    if full != list(range(every - 1, len(kinds), every)):
        facts.problem(
            f"config.json: {facts.path}layer_types has full attention at layers {full}; the "
            "runtimes place it at every n-th layer only"
        )
    return every


def rope_by_kind(
    facts: Facts, *, full_theta: float, sliding_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Position settings of the full and of the sliding layers.

    Transformers 5 writes ``rope_parameters`` by layer kind; published configs scale the full
    layers alone and state the sliding layers' base as ``rope_local_base_freq``.
    """
    by_kind = facts.data.get("rope_parameters")
    if not isinstance(by_kind, dict) or not {FULL, SLIDING} & set(by_kind):
        local = {"rope_theta": facts.number("rope_local_base_freq", sliding_theta)}
        return spell.rope(facts, default_theta=full_theta), {"rope_type": "default", **local}

    def of(kind: str, theta: float) -> dict[str, Any]:
        path = f"{facts.path}rope_parameters.{kind}."
        inner = Facts({"rope_parameters": by_kind.get(kind)}, path=path, parent=facts)
        return spell.rope(inner, default_theta=theta)

    return of(FULL, full_theta), of(SLIDING, sliding_theta)
