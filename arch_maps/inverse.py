"""Solving a map backwards: source tensors as expressions over the target tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable

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
    factors,
)


def invert(
    equations: Iterable[tuple[Source, Expr]], *, at_hand: Container[str] = ()
) -> dict[str, Expr]:
    """Solve ``target = expr(sources)`` for every source that the targets determine.

    Each equation is unwrapped from its root: an op with an inverse moves to the other side, a
    concat or stack falls apart, and slices of one value are gathered until they tile it. Sources
    that appear in several targets (aliases) take the first solution. A source that stays partly
    unknown is absent from the result. A folded adapter is taken off again, up to rounding, where
    the names of both its factors are ``at_hand``.
    """
    solved: dict[str, Expr] = {}
    partial: dict[tuple[Expr, int], dict[tuple[int, int], Expr]] = defaultdict(dict)
    work: list[tuple[Expr, Expr]] = [(expr, target) for target, expr in equations]
    work.reverse()
    while work:
        unknown, known = work.pop()
        match unknown:
            case Source():
                solved.setdefault(unknown.name, known)
            case Constant():
                pass
            case LowRank():
                if all(leaf.name in at_hand for leaf in factors(unknown)):
                    taken_off = LowRank(known, unknown.up, unknown.down, -unknown.scale, wide=True)
                    work.append((unknown.x, taken_off))
            case Permute():
                back = tuple(unknown.axes.index(axis) for axis in range(len(unknown.axes)))
                work.append((unknown.x, Permute(known, back)))
            case Reshape():
                work.append((unknown.x, Reshape(known, unknown.x.shape)))
            case Affine():
                scale = 1.0 / unknown.scale
                work.append((unknown.x, Affine(known, scale, -unknown.offset * scale)))
            case HeadHadamard():
                work.append((unknown.x, HeadHadamard(known, unknown.axis, unknown.head)))
            case Concat():
                for part, low, high in unknown.spans():
                    work.append((part, Slice(known, unknown.axis, low, high)))
            case Stack():
                for index, part in enumerate(unknown.parts):
                    row = Slice(known, unknown.axis, index, index + 1)
                    work.append((part, Reshape(row, part.shape)))
            case Slice():
                pieces = partial[unknown.x, unknown.axis]
                pieces[unknown.start, unknown.stop] = known
                whole = _tile(pieces, unknown.x.shape[unknown.axis], unknown.axis)
                if whole is not None:
                    work.append((unknown.x, whole))
    return solved


def _tile(pieces: dict[tuple[int, int], Expr], size: int, axis: int) -> Expr | None:
    at = 0
    ordered: list[Expr] = []
    for (start, stop), piece in sorted(pieces.items(), key=lambda item: item[0]):
        if start != at:
            return None
        ordered.append(piece)
        at = stop
    if at != size:
        return None
    return ordered[0] if len(ordered) == 1 else Concat(tuple(ordered), axis)
