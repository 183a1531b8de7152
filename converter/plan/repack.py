"""Exact repacking through a map: what an expression does to whole rows, done to codes and scales.

An op that only moves rows commutes with quantization along them, so the same op makes the codes of
its result from the codes of its inputs, and the scales from the scales. ``follow`` rewrites an
expression so, keeping track of the axis that groups lie along; arithmetic and ops that cut through
groups have no such counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from arch_maps.ops import Concat, Expr, Permute, Reshape, Shape, Slice, Source, Stack, sources
from converter.decode import Coded
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Repack:
    """A parameter in the codes of its source: how each stored tensor of MLX is made."""

    spec: QuantSpec
    parts: dict[str, Expr]
    """By role: an expression over ``NAME@ROLE:DTYPE``, as DecodingReader reads it."""
    rounding: str
    """What is rounded, in words; empty where nothing is."""


def repack(expr: Expr, coded: Mapping[str, Coded], dtype: str) -> Repack | str:
    """How ``expr`` is made of its sources' codes, or why it cannot be."""
    leaves = {leaf.name: coded.get(leaf.name) for leaf in sources(expr)}
    natives = [None if one is None else one.native for one in leaves.values()]
    if not natives or None in natives:
        return "its source has no counterpart in MLX"
    specs = {native.spec for native in natives if native is not None}
    if len(specs) != 1:
        return "its sources are quantized in different ways"
    spec = next(iter(specs))
    shape = tuple(map(int, expr.shape))
    moved = "the map does not move its rows as they are"
    if shape[-1] % spec.group_size:
        return moved
    parts = {}
    for role, (_, stored) in spec.output_tensors(shape, dtype).items():
        made_of = {name: _part(coded[name], role, spec, dtype) for name in leaves}
        made = follow(expr, made_of)
        if made is None or made[1] != len(shape) - 1 or tuple(map(int, made[0].shape)) != stored:
            return moved
        parts[role] = made[0]
    roundings = dict.fromkeys(native.rounding(dtype) for native in natives if native is not None)
    return Repack(spec=spec, parts=parts, rounding=", ".join(filter(None, roundings)))


def follow(expr: Expr, leaves: Mapping[str, tuple[Expr, int]]) -> tuple[Expr, int] | None:
    """``expr`` over other leaves that differ from its own in the size of one axis.

    ``leaves`` gives each source tensor's replacement and that axis. Returns the expression and the
    axis in its result, None where an op cuts, mixes or changes what lies along the axis.
    """
    match expr:
        case Source():
            return leaves[expr.name]
        case Permute(x, axes):
            inner = follow(x, leaves)
            return None if inner is None else (Permute(inner[0], axes), axes.index(inner[1]))
        case Slice(x, axis, start, stop):
            inner = follow(x, leaves)
            if inner is None or inner[1] == axis:
                return None
            return Slice(inner[0], axis, start, stop), inner[1]
        case Reshape(x, shape):
            inner = follow(x, leaves)
            return None if inner is None else _reshaped(inner[0], inner[1], x.shape, shape)
        case Concat(parts, axis):
            joined = _all(parts, leaves)
            return None if joined is None else (Concat(joined[0], axis), joined[1])
        case Stack(parts, axis):
            joined = _all(parts, leaves)
            if joined is None:
                return None
            return Stack(joined[0], axis), joined[1] + (axis <= joined[1])
    return None


def _all(
    parts: tuple[Expr, ...], leaves: Mapping[str, tuple[Expr, int]]
) -> tuple[tuple[Expr, ...], int] | None:
    """Every part followed, where all agree on the axis."""
    made = []
    axis = -1
    for part in parts:
        inner = follow(part, leaves)
        if inner is None or axis not in (-1, inner[1]):
            return None
        axis = inner[1]
        made.append(inner[0])
    return tuple(made), axis


def _reshaped(inner: Expr, axis: int, before: Shape, after: Shape) -> tuple[Expr, int] | None:
    """A reshape that leaves the axis whole: as many elements come before it as did."""
    lead, size = math.prod(map(int, before[:axis])), int(before[axis])
    for place in range(len(after)):
        if math.prod(map(int, after[:place])) == lead and int(after[place]) == size:
            shape = (*after[:place], inner.shape[axis], *after[place + 1 :])
            return Reshape(inner, shape), place
    return None


def _part(coded: Coded, role: str, spec: QuantSpec, dtype: str) -> tuple[Expr, int]:
    """The stored tensor ``role`` of a coded leaf, and the axis that its groups lie along."""
    shape = spec.output_tensors(coded.stored, dtype)[role][1]
    axis = len(shape) - 1
    if coded.axes is not None:
        shape = tuple(shape[i] for i in coded.axes)
        axis = coded.axes.index(axis)
    return Source(f"{coded.name}@{role}:{dtype}", shape), axis
