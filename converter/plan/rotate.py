"""Values rotated offline: a Hadamard matrix folded into value and output projections.

The cache then holds rotated values, whose energy no channel carries alone, under any runtime's own
scheme of quantization; the output projection turns them back. As QuaRot does for values
(arXiv 2404.00456, section 4), but within each head, so that nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from arch_maps.ops import HeadHadamard
from arch_maps.rules import Rule, ValuePath
from converter.errors import PlanError
from converter.plan.match import grouped

FLAG = "--kv-rotate-values"


def values(rules: Sequence[Rule], paths: Iterable[ValuePath]) -> tuple[tuple[Rule, ...], str]:
    """The rules with every head of values rotated, and what the plan says of it.

    Legal where the map states that a layer only adds values up, where its attention module holds
    nothing else (a gate, a norm, sinks), and where a head is a power of two. PlanError naming the
    layers and the reason where any is not.
    """
    by_name = {rule.target: rule for rule in rules}
    problems: list[str] = []
    turned: dict[str, Rule] = {}
    count = 0
    for path in paths:
        if reason := _obstacle(by_name, path):
            problems.append(f"{FLAG}: {path.module}: {reason}")
            continue
        count += 1
        names = (f"{path.value}.weight", f"{path.value}.bias", f"{path.output}.weight")
        for leaf, axis in zip(names, (0, 0, 1), strict=True):
            if rule := by_name.get(f"{path.module}.{leaf}"):
                turned[rule.target] = replace(rule, expr=HeadHadamard(rule.expr, axis, path.head))
    if not turned and not problems:
        problems.append(
            f"{FLAG}: the map of this type does not say that its attention layers only add values "
            "up, so a rotation could change what they compute"
        )
    if problems:
        raise PlanError(grouped(problems))
    said = (
        f"values of {count} layers are rotated: value projections make, and output projections "
        "take, each head times a Hadamard matrix, so that a quantized cache loses less of it; but "
        "for rounding the model computes the same"
    )
    return tuple(turned.get(rule.target, rule) for rule in rules), said


def _obstacle(by_name: dict[str, Rule], path: ValuePath) -> str:
    """Why values of this layer cannot be rotated; empty where they can."""
    if path.reason:
        return path.reason
    if path.head & (path.head - 1):
        return f"a head has {path.head} channels, which is no power of two"
    prefix = f"{path.module}."
    known = {path.value, path.output, *path.beside}
    inside = (name.removeprefix(prefix) for name in by_name if name.startswith(prefix))
    others = sorted({name.partition(".")[0] for name in inside} - known)
    if others:
        return f"{', '.join(others)} may touch values before {path.output}"
    return ""
