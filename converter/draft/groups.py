"""Rules of one release, said once for all layers that share them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arch_maps.ops import (
    Affine,
    Concat,
    Constant,
    Expr,
    HeadHadamard,
    LowRank,
    Permute,
    Reshape,
    Slice,
    Source,
    Stack,
    children,
    sources,
)
from arch_maps.rules import Part, Rule

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")


@dataclass(frozen=True, slots=True)
class Layered:
    """Rules that a run of layers shares: names below the layer, on both sides."""

    target: str
    """The list of layers there, such as ``model.layers``."""
    source: str
    """The list of layers here; empty where the rules read nothing of a layer."""
    part: Part
    rules: tuple[tuple[Rule, tuple[int, ...]], ...]
    """A rule relative to its layer, and the layers that have it."""
    count: int


@dataclass(frozen=True, slots=True)
class Grouped:
    """All rules of a release: those of layers, and those that stand alone."""

    stacks: tuple[Layered, ...]
    single: tuple[Rule, ...]


def group(rules: Sequence[Rule]) -> Grouped:
    """Gather the rules that differ in nothing but the number of their layer."""
    gathered: dict[tuple[str, str, Part], dict[Rule, list[int]]] = defaultdict(dict)
    single = []
    for rule in rules:
        found = _LAYER.match(rule.target)
        origin = None if found is None else _list_of(rule.expr, int(found[2]))
        if found is None or origin is None:
            single.append(rule)
            continue
        index = int(found[2])
        relative = replace(
            rule, target=found[3], expr=_renamed(rule.expr, f"{origin}.{index}." if origin else "")
        )
        gathered[found[1], origin, rule.part].setdefault(relative, []).append(index)
    stacks = []
    for (target, source, part), members in gathered.items():
        count = 1 + max(max(indices) for indices in members.values())
        if count == 1:  # a list of one: no layers to speak of
            single += [_absolute(rule, target, source) for rule in members]
            continue
        ordered = tuple((rule, tuple(indices)) for rule, indices in members.items())
        stacks.append(Layered(target, source, part, ordered, count))
    return Grouped(tuple(stacks), tuple(single))


def condition(
    indices: Sequence[int], count: int, config: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]] | None:
    """How the config tells which layers: a Python test of ``index`` and what it reads.

    None for all layers. The text is of the form ``index >= first_dense``; a list of kinds gives
    ``kinds[index] == "attention"``. Where nothing in the config says it, the numbers are listed.
    """
    if list(indices) == list(range(count)):
        return None
    for name, value in config.items():
        if type(value) is int and 0 < value < count:
            if list(indices) == list(range(value, count)):
                return f"index >= {name}", (name,)
            if list(indices) == list(range(value)):
                return f"index < {name}", (name,)
            for test, keep in (
                (f"(index + 1) % {name} == 0", True),
                (f"(index + 1) % {name}", False),
            ):
                if list(indices) == [i for i in range(count) if ((i + 1) % value == 0) is keep]:
                    return test, (name,)
        if isinstance(value, list) and len(value) == count:
            for kind in {repr(item): item for item in value}.values():
                if list(indices) == [i for i in range(count) if value[i] == kind]:
                    return f"{name}[index] == {kind!r}", (name,)
    return f"index in {set(indices)!r}", ()


def rebuild(expr: Expr, leaf: Any) -> Expr:
    """The same expression over other leaves."""
    match expr:
        case Source():
            made: Expr = leaf(expr)
            return made
        case Constant():
            return expr
        case Concat() | Stack():
            return replace(expr, parts=tuple(rebuild(part, leaf) for part in expr.parts))
        case Permute() | Reshape() | Slice() | Affine() | HeadHadamard():
            return replace(expr, x=rebuild(expr.x, leaf))
        case LowRank():
            x, up, down = (rebuild(child, leaf) for child in children(expr))
            return LowRank(x, up, down, expr.scale)


def _list_of(expr: Expr, index: int) -> str | None:
    """The list of layers that all leaves lie in, "" without leaves; None where there is none."""
    found = set()
    for leaf in sources(expr):
        before, middle, _ = leaf.name.partition(f".{index}.")
        if not middle or re.search(r"\.\d+(\.|$)", before):
            return None
        found.add(before)
    if not found:
        return ""
    return found.pop() if len(found) == 1 else None


def _renamed(expr: Expr, prefix: str) -> Expr:
    return rebuild(expr, lambda leaf: replace(leaf, name=leaf.name.removeprefix(prefix)))


def _absolute(rule: Rule, target: str, source: str) -> Rule:
    expr = rebuild(rule.expr, lambda leaf: replace(leaf, name=f"{source}.0.{leaf.name}"))
    return replace(rule, target=f"{target}.0.{rule.target}", expr=expr)
