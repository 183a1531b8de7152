"""Matching a map against the tensors that a release really has."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from arch_maps.facts import Facts, spell_shape
from arch_maps.ops import Source as SourceLeaf
from arch_maps.ops import sources
from arch_maps.registry import ArchMap, find, map_name, model_types
from arch_maps.rules import Drop, Layout, Rule, Tensors, ValuePath
from arch_maps.unmapped import RUNTIME_ONLY, UNMAPPED
from converter.config_errors import config_errors
from converter.errors import PlanError
from converter.source import Source, TensorInfo
from converter.source.header import paused_gc

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_SHOWN = 10
_COMPARED = 10_000
"""Pairs of names; each takes up to a tenth of a millisecond."""


@dataclass(frozen=True, slots=True)
class Match:
    """A map that accounts for every tensor of a release."""

    arch: ArchMap
    layout: Layout
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    """Only those whose tensor is present."""
    notes: tuple[str, ...]
    values: tuple[ValuePath, ...] = ()


def find_map(config: Mapping[str, Any]) -> ArchMap:
    """The map for a release's model_type; raises PlanError with the nearest known types."""
    model_type = map_name(config)
    if not isinstance(model_type, str):
        raise PlanError(["config.json: model_type is missing, so no map can be chosen"])
    arch = find(model_type)
    if arch is None:
        near = difflib.get_close_matches(model_type, model_types(), n=3)
        hint = f"; similar: {', '.join(near)}" if near else ""
        why = UNMAPPED.get(model_type) or RUNTIME_ONLY.get(model_type)
        hint += f"; {why}" if why else ""
        raise PlanError(
            [
                f"config.json: no map for model_type {model_type!r}{hint} "
                "(`convert maps list` shows all)"
            ]
        )
    return arch


@paused_gc()
def match_release(source: Source, arch: ArchMap) -> Match:
    """Account for every tensor of ``source``; raises PlanError with all problems, grouped."""
    candidates = []
    for layout in arch.layouts:
        facts = Facts(source.config)
        with config_errors(f"the map for {arch.model_type}"):
            tensors = arch.expand(facts, layout)
        if facts.problems:  # sizes are unreliable, so comparing shapes would only mislead
            raise PlanError(facts.problems)
        candidates.append((layout, tensors, facts))
    layout, tensors, facts = candidates[0]
    if len(candidates) > 1:
        layout, tensors, facts = min(candidates, key=lambda one: unmatched(source, one[1]))
    problems = disagreements(source.tensors, tensors)
    if problems:
        raise PlanError(grouped(problems))
    present = tuple(drop for drop in tensors.drops if drop.name in source.tensors)
    return Match(
        arch,
        layout,
        tuple(tensors.rules),
        present,
        tuple(facts.notes),
        tuple(tensors.values),
    )


def unmatched(source: Source, tensors: Tensors) -> int:
    """How many tensors disagree in name or shape, to tell layouts apart quickly."""
    have = source.tensors
    wanted = {leaf.name: leaf.shape for rule in tensors.rules for leaf in sources(rule.expr)}
    known = wanted.keys() | _drops(have, tensors).keys()
    shared = wanted.keys() & have.keys()
    otherwise = sum(have[name].shape != wanted[name] for name in shared)
    return len(wanted.keys() - have.keys()) + len(have.keys() - known) + otherwise


def _drops(have: Mapping[str, TensorInfo], tensors: Tensors) -> dict[str, Drop]:
    """The drops that hold for this release, by name."""
    return {
        drop.name: drop
        for drop in tensors.drops
        if drop.only_with is None or drop.only_with in have
    }


def disagreements(have: Mapping[str, TensorInfo], tensors: Tensors) -> list[str]:
    """One line for each tensor that is missing, surplus or of another shape than stated."""
    wanted: dict[str, SourceLeaf] = {}
    for rule in tensors.rules:
        expr = rule.expr
        if isinstance(expr, SourceLeaf):  # nearly every one of a large release
            wanted[expr.name] = expr
        else:
            wanted.update((leaf.name, leaf) for leaf in sources(expr))
    drops = _drops(have, tensors)
    missing, misshapen = [], []
    for name, leaf in wanted.items():
        info = have.get(name)
        if info is None:
            missing.append(name)
        elif info.shape != leaf.shape:
            misshapen.append(_wrong(name, info.shape, leaf.shape, info.file))
    used = len(wanted) - len(missing) + sum(name in have for name in drops.keys() - wanted.keys())
    missing += [d.name for d in drops.values() if d.required and d.name not in have]
    surplus = []
    if used < len(have):
        surplus = [name for name in have if name not in wanted and name not in drops]
    # A wholesale mismatch takes long to compare, and near names explain nothing of it.
    few = len(missing) * len(surplus) <= _COMPARED
    problems = [f"missing: {name}{_near(name, surplus if few else [])}" for name in missing]
    problems += [
        f"surplus: {name} {list(have[name].shape)} in {have[name].file}: "
        f"the map for this type has no use for it{_near(name, missing if few else [])}"
        for name in surplus
    ]
    problems += misshapen
    for name, drop in drops.items():
        if name in have and drop.shape is not None and have[name].shape != drop.shape:
            problems.append(_wrong(name, have[name].shape, drop.shape, have[name].file))
    return problems


def _wrong(name: str, found: tuple[int, ...], expected: tuple[int, ...], file: str) -> str:
    return (
        f"wrong shape: {name} is {list(found)} in {file}, "
        f"but config.json makes it {spell_shape(expected)}"
    )


def _near(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    return f" (did you mean {near[0]}?)" if near else ""


def grouped(problems: Iterable[str]) -> list[str]:
    """One line for each run of layers that share a problem, the first lines of each kind."""
    groups: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        groups[_INDEX.sub("{}", problem)].append(problem)
    lines = []
    for pattern, members in groups.items():
        if len(members) == 1:
            lines.append(members[0])
            continue
        numbers = sorted({int(n) for m in members for n in _INDEX.findall(m)[:1]})
        collapsed = pattern.replace("{}", f"{{{ranges(numbers)}}}", 1).replace("{}", "*")
        lines.append(f"{collapsed} ({len(members)} tensors)")
    by_kind: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        by_kind[line.partition(":")[0]].append(line)
    shown = []
    for kind, members in by_kind.items():
        shown += members[:_SHOWN]
        if len(members) > _SHOWN:
            shown.append(f"{kind}: and {len(members) - _SHOWN} more like these")
    return shown


def ranges(numbers: list[int]) -> str:
    """Sorted integers as ranges, such as ``0-3,7``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)
