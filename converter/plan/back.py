"""Plans that start from an MLX checkpoint: back to torch, or dequantized in place."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from arch_maps.config import spell_dtype, start, stored_dtype
from arch_maps.dtypes import FLOAT_CODES
from arch_maps.facts import Facts, spell_shape
from arch_maps.inverse import invert
from arch_maps.ops import Expr, sources
from arch_maps.ops import Source as Leaf
from arch_maps.registry import ArchMap
from arch_maps.rules import Drop, Kind, Rule
from converter.errors import PlanError
from converter.plan import rotate
from converter.plan.build import assemble, main_dtype, pending_tensors
from converter.plan.model import Output, Plan
from converter.plan.options import Options
from converter.source import Source


def build_back_plan(
    source: Source,
    arch: ArchMap,
    options: Options,
    *,
    origin: Mapping[str, Any] | None = None,
    torch_config: Mapping[str, Any] | None = None,
    restore: Iterable[str] = (),
    layout: str | None = None,
    carried: Iterable[str] = (),
    rotated: bool = False,
) -> Plan:
    """Plan an MLX checkpoint (decoded view) as torch or as plain MLX; raises PlanError.

    ``torch_config`` is the release's own config where a manifest kept it, ``layout`` the layout
    it was read in, ``restore`` the tied tensors that the release held twice, ``carried`` torch
    tensors that ``source`` holds beside the checkpoint's own and that go along as they are,
    ``rotated`` whether the values of ``source`` are rotated and are to be turned back.
    """
    facts = Facts(source.config)
    chosen = next((one for one in arch.layouts if one.name == layout), arch.layouts[0])
    tensors = arch.expand(facts, chosen)
    if facts.problems:
        raise PlanError(facts.problems)
    known = {rule.target: tuple(map(int, rule.expr.shape)) for rule in tensors.rules}
    carried = tuple(carried)
    problems = _disagreements(source, known, set(carried))
    if problems:
        raise PlanError(problems)
    if options.target == "torch":
        there = rotate.values(tensors.rules, tensors.values)[0] if rotated else tensors.rules
        rules = _inverse_rules(there, tensors.drops, set(restore), carried, problems)
        rules += [_as_is(source, name) for name in carried]
        config = dict(torch_config) if torch_config is not None else start(source.config)
        metadata = {"format": "pt"}
    else:
        rules = [
            Rule(rule.target, Leaf(rule.target, known[rule.target]), rule.kind, rule.part)
            for rule in tensors.rules
        ]
        config = start(source.config)
        metadata = {"format": "mlx"}
    if problems:
        raise PlanError(problems)
    outputs = []
    for rule in rules:
        leaf = sources(rule.expr)[0]
        code = source.tensors[leaf.name].dtype
        if code in FLOAT_CODES:  # a dtype is asked for weights, not for numbers that count
            code = options.dtype_code or code
        if rule.kind is Kind.INDEX:
            code = "I64"  # as torch indexes
        stored = pending_tensors(rule.target, rule.expr.shape, code, None)
        outputs.append(Output(rule, code, None, stored))
    used = main_dtype(outputs)
    if options.dtype or stored_dtype(config) != used:  # else the config stays to the letter
        spell_dtype(config, used)
    return assemble(
        source,
        outputs,
        model_type=arch.model_type,
        layout=chosen.name,
        drops=(),
        options=options,
        config=config,
        notes=source.notes,
        origin=origin,
        metadata=metadata,
    )


def _as_is(source: Source, name: str) -> Rule:
    return Rule(name, Leaf(name, source.tensors[name].shape), Kind.STATE, "text")


def _disagreements(
    source: Source, known: Mapping[str, tuple[int, ...]], carried: set[str]
) -> list[str]:
    have = source.tensors
    problems = [f"missing: {name} is not in the MLX checkpoint" for name in known.keys() - have]
    problems += [
        f"surplus: {name} has no place in the map for this type"
        for name in have.keys() - known - carried
    ]
    problems += [
        f"wrong shape: {name} is {list(have[name].shape)}, the map makes it {spell_shape(shape)}"
        for name, shape in known.items()
        if name in have and have[name].shape != shape
    ]
    return sorted(problems)


def _inverse_rules(
    rules: Iterable[Rule],
    drops: Iterable[Drop],
    restore: set[str],
    carried: Container[str],
    problems: list[str],
) -> list[Rule]:
    rules = list(rules)
    origin = {leaf.name: rule for rule in reversed(rules) for leaf in sources(rule.expr)}
    solved: dict[str, Expr] = invert(
        ((Leaf(rule.target, tuple(map(int, rule.expr.shape))), rule.expr) for rule in rules),
        at_hand=carried,
    )
    problems += [
        f"not invertible: {name} cannot be told from the MLX tensors"
        for name in origin
        if name not in solved and name not in carried
    ]
    back = [Rule(name, expr, origin[name].kind, origin[name].part) for name, expr in solved.items()]
    for drop in drops:
        if drop.name in restore and drop.same_as in solved:
            twin = origin[drop.same_as]
            back.append(Rule(drop.name, solved[drop.same_as], twin.kind, twin.part))
    return back
