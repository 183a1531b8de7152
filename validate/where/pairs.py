"""Which module of the torch class answers to which module of the runtime, told by the map.

A rule joins source tensors to a target parameter. Two modules compute the same function when the
same joins end in both and in nothing else: dense layers and norms one by one, and above them
attention, experts, blocks and towers, however each side nests and names them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from arch_maps.ops import Affine, Expr, Permute, Reshape, Source, row_count, sources
from arch_maps.rules import Rule


@dataclass(frozen=True, slots=True)
class Pair:
    """A module's path in the torch model and in the MLX model."""

    torch: str
    mlx: str
    scaled: bool = False
    """Whether the runtime's weights hold multipliers that torch applies apart."""


def pair_modules(
    rules: Iterable[Rule], held: Mapping[str, str], loaded: Mapping[str, str]
) -> list[Pair]:
    """The pairs of modules, innermost and outermost alike.

    ``held``: source tensor -> the torch parameter that holds it; ``loaded``: target parameter ->
    its path in the runtime's tree. Rules of tensors that either side does not show are left out.
    """
    left: dict[str, int] = defaultdict(int)
    right: dict[str, int] = defaultdict(int)
    moved: set[str] = set()
    scaled: set[str] = set()
    for rule in rules:
        names = {leaf.name for leaf in sources(rule.expr)}
        if not names:
            continue
        for name in names:
            join = _token(f"{name} {rule.target}")
            for path in _above(held.get(name, f"?.{name}")):
                left[path] += join
            for path in _above(loaded.get(rule.target, f"?.{rule.target}")):
                right[path] += join
        module = loaded.get(rule.target, "").rpartition(".")[0]
        if not _keeps_rows(rule.expr):
            moved.add(module)
        if isinstance(rule.expr, Affine) and rule.expr.scale != 1.0:
            scaled.add(module)
    by_joins: dict[int, list[str]] = defaultdict(list)
    for path, total in right.items():
        if not path.startswith("?"):
            by_joins[total].append(path)
    pairs = []
    for torch_paths, mlx_paths in _chains(left, by_joins):
        for a, b in _aligned(torch_paths, mlx_paths):
            if b not in moved:  # its rows lie in another order, and so does what it computes
                pairs.append(Pair(a, b, b in scaled))
    return pairs


def _token(text: str) -> int:
    """A number that stands for a join: sums of them tell sets of joins apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=12).digest(), "little")


def _above(parameter: str) -> Iterator[str]:
    """Every module that a parameter belongs to, the whole model left out."""
    path = parameter.rpartition(".")[0]
    while path:
        yield path
        path = path.rpartition(".")[0]


def _chains(
    left: Mapping[str, int], by_joins: Mapping[int, list[str]]
) -> Iterator[tuple[list[str], list[str]]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for path, total in left.items():
        if not path.startswith("?") and total in by_joins:
            groups[total].append(path)
    for total, paths in groups.items():
        yield sorted(paths, key=len), sorted(by_joins[total], key=len)


def _aligned(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Modules that only wrap one another: those called alike, else the outermost two."""
    names = {path.rpartition(".")[2]: path for path in right}
    alike = [(path, names[last]) for path in left if (last := path.rpartition(".")[2]) in names]
    if alike:
        yield from alike
    else:
        yield left[0], right[0]


def _keeps_rows(expr: Expr) -> bool:
    """Whether the parameter has its source's rows in their order, one source for it all."""
    if isinstance(expr, Source):
        return True
    if isinstance(expr, Affine):
        return _keeps_rows(expr.x)
    if isinstance(expr, Permute):
        return expr.row_local and _keeps_rows(expr.x)
    if isinstance(expr, Reshape):
        return row_count(expr.shape) == row_count(expr.x.shape) and _keeps_rows(expr.x)
    return False
