"""Statements of a drafted map: one call for each module or tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from arch_maps.ops import Affine, Expr, Permute, Source
from arch_maps.rules import Kind, Rule
from converter.draft.words import WIDTH, Words, call, quoted

_PLACE = re.compile(r'(\w+\.at\(source="[^"]*", target="([^"]*)"\))\.\w+\(')
"""A statement that starts with a mount of its own."""


def statements(
    members: Sequence[tuple[Rule, Any]], mount: str, words: Words, *, tied: str | None = None
) -> list[str]:
    """One call for each module or tensor, in the order of the model."""
    by_target = {rule.target: rule for rule, _ in members}
    modules: dict[str, str] = {}
    within: set[str] = set()
    """Biases that the statement of their weight makes; they may stand before it."""
    for rule, labels in members:
        bias = by_target.get(rule.target.removesuffix("weight") + "bias")
        text = _module(rule, labels, bias, mount, words, tied)
        if text is not None:
            modules[rule.target] = text
            within |= set() if bias is None else {bias.target}
    return [
        modules.get(rule.target) or _plain(rule, labels, mount, words)
        for rule, labels in members
        if rule.target not in within
    ]


def hoisted(statements: Sequence[str]) -> list[str]:
    """The statements, with a mount that several of them make given a name first."""
    places = [found[1] for text in statements if (found := _PLACE.match(text))]
    names: dict[str, str] = {}
    lines = []
    for text in statements:
        found = _PLACE.match(text)
        if found is not None and (places.count(found[1]) > 1 or len(text) > WIDTH - 12):
            place = found[1]
            if place not in names:
                name = re.sub(r"\W+", "_", found[2] or "inner") + "_at"
                taken = sum(other.startswith(name) for other in names.values())
                names[place] = f"{name}_{taken + 1}" if taken else name
                lines.append(f"{names[place]} = {place}")
            text = names[place] + text.removeprefix(place)
        lines.append(text)
    return lines


def _module(
    rule: Rule, labels: Any, bias: Rule | None, mount: str, words: Words, tied: str | None
) -> str | None:
    """``linear``, ``embedding``, ``norm`` or ``conv``, where one of them says the whole module."""
    leaf = leaf_of(rule.expr)
    if leaf is None or not (rule.target.endswith(".weight") and leaf.name.endswith(".weight")):
        return None
    source = leaf.name.removesuffix(".weight")
    if bias is not None and bias.expr != Source(f"{source}.bias", (int(rule.expr.shape[0]),)):
        return None
    place, name = _placed(mount, source, rule.module)
    if name is None:
        return None
    more = [] if bias is None else ["bias=True"]
    shape = rule.expr.shape
    match rule.kind:
        case Kind.NORM if len(shape) == 1 and isinstance(rule.expr, Source | Affine):
            if isinstance(rule.expr, Affine):
                if rule.expr.scale != 1.0 or not isinstance(rule.expr.x, Source):
                    return None
                more.append(f"offset={rule.expr.offset!r}")
            return call(f"{place}.norm", [quoted(name), *words.dims(shape, labels), *more])
        case Kind.CONV if isinstance(rule.expr, Permute) and isinstance(rule.expr.x, Source):
            if rule.expr.axes != (0, *range(2, len(shape)), 1):
                return None
            out, *kernel, inp = words.dims(shape, labels)
            return call(f"{place}.conv", [quoted(name), out, inp, *kernel, *more])
        case Kind.LINEAR | Kind.GATE if len(shape) == 2 and isinstance(rule.expr, Source):
            more += [] if rule.kind is Kind.LINEAR else ["kind=Kind.GATE"]
            return call(f"{place}.linear", [quoted(name), *words.dims(shape, labels), *more])
        case Kind.EMBEDDING | Kind.POSITION if (
            len(shape) == 2 and isinstance(rule.expr, Source) and bias is None
        ):
            more += [] if rule.kind is Kind.EMBEDDING else ["kind=Kind.POSITION"]
            return call(f"{place}.embedding", [quoted(name), *words.dims(shape, labels), *more])
        case Kind.HEAD if len(shape) == 2 and isinstance(rule.expr, Source) and bias is None:
            dims = words.dims(shape, labels)
            if tied is not None:
                return call(f"{place}.head", [quoted(name), *dims, f"tied_to={tied}"])
            return call(f"{place}.linear", [quoted(name), *dims, "kind=Kind.HEAD"])
    return None


def _plain(rule: Rule, labels: Any, mount: str, words: Words) -> str:
    if isinstance(rule.expr, Source):
        place, name = _placed(mount, rule.expr.name, rule.target)
        if name is not None:
            dims = words.dims(rule.expr.shape, labels)
            return call(f"{place}.tensor", [quoted(name), *dims, f"kind=Kind.{rule.kind.name}"])
    value = words.expression(rule.expr, labels, mount)
    return call(f"{mount}.rule", [quoted(rule.target), value, f"Kind.{rule.kind.name}"])


def leaf_of(expr: Expr) -> Source | None:
    """The one tensor that a plain, shifted or permuted module reads."""
    if isinstance(expr, Affine | Permute):
        return expr.x if isinstance(expr.x, Source) else None
    return expr if isinstance(expr, Source) else None


def _placed(mount: str, source: str, target: str) -> tuple[str, str | None]:
    """A mount and a name below it that stand for ``source`` there and ``target`` here."""
    if source == target:
        return mount, target
    mine, theirs = target.split("."), source.split(".")
    shared = 0
    while shared < min(len(mine), len(theirs)) and mine[-1 - shared] == theirs[-1 - shared]:
        shared += 1
    if not shared:
        return mount, None
    there, here = ".".join(theirs[:-shared]), ".".join(mine[:-shared])
    place = call(f"{mount}.at", [f"source={quoted(there)}", f"target={quoted(here)}"])
    return place, ".".join(mine[-shared:])
