"""Where an adapter's updates land: rows of the release's own tensors, found through the map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from arch_maps.facts import Facts
from arch_maps.ops import Concat, Expr, Permute, Slice, Stack, sources
from arch_maps.ops import Source as Leaf
from arch_maps.rules import Rule
from converter.adapter.model import Piece, Update
from converter.plan.match import Match
from converter.source import Source

_TRANSPOSE = (1, 0)


class Names:
    """The names by which adapters know a release's tensors."""

    def __init__(self, source: Source, match: Match) -> None:
        """Names of ``source``, whose tensors ``match`` accounts for."""
        self._source = source
        self._match = match

    def tensor(self, name: str) -> str | None:
        """The release's tensor that a torch parameter ``name`` is.

        It is called so in the release, or in another layout of the same map: models in memory
        carry the names of the newest one.
        """
        return name if name in self._source.tensors else self._aliases.get(name)

    def rule(self, module: str) -> Rule | None:
        """The rule that makes the weight of the runtime module ``module``.

        The runtimes disagree on whether a model's text part has a name of its own.
        """
        inner = "language_model."
        for name in (module, inner + module, module.removeprefix(inner)):
            if (found := self._rules.get(f"{name}.weight")) is not None:
                return found
        return None

    def transposed(self, name: str) -> bool:
        """Whether the map says that the release stores the matrix [in, out]."""
        return name in self._transposed

    @cached_property
    def _rules(self) -> Mapping[str, Rule]:
        return {rule.target: rule for rule in self._match.rules}

    @cached_property
    def _transposed(self) -> frozenset[str]:
        return frozenset(
            leaf.name
            for rule in self._match.rules
            for node in _nodes(rule.expr)
            if isinstance(node, Permute) and node.axes == _TRANSPOSE
            for leaf in sources(node)
        )

    @cached_property
    def _aliases(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for layout in self._match.arch.layouts:
            for rule in self._match.arch.expand(Facts(self._source.config), layout).rules:
                mine = self._rules.get(rule.target)
                theirs = sources(rule.expr)
                ours = () if mine is None else sources(mine.expr)
                if [leaf.shape for leaf in ours] == [leaf.shape for leaf in theirs]:
                    pairs = zip(theirs, ours, strict=True)
                    found.update({leaf.name: own.name for leaf, own in pairs})
        return found


def pieces_of(update: Update, expr: Expr) -> Iterator[tuple[str, Piece]]:
    """The rows of source tensors that an update of ``expr`` comes down to; ValueError where none.

    ``expr`` makes the matrix that the update is for: joined, stacked, sliced or transposed source
    tensors take their share of its rows.
    """
    yield from _carried(update, expr, 0, None)


def _carried(
    update: Update, expr: Expr, first: int, expert: int | None
) -> Iterator[tuple[str, Piece]]:
    rows = int(expr.shape[0])
    match expr:
        case Leaf():
            yield expr.name, Piece(update=update, start=0, stop=rows, first=first, expert=expert)
        case Slice(x=Leaf() as leaf, axis=0) if not update.by_column:
            yield (
                leaf.name,
                Piece(update=update, start=expr.start, stop=expr.stop, first=first, expert=expert),
            )
        case Permute(x=Leaf() as leaf) if expr.axes == _TRANSPOSE and not first:
            flipped = update.flipped
            size = int(leaf.shape[0])
            yield leaf.name, Piece(update=flipped, start=0, stop=size, expert=expert)
        case Concat(axis=0) if not update.by_column:
            for part, low, _ in expr.spans():
                yield from _carried(update, part, first + low, expert)
        case Stack(axis=0) if expert is None and update.experts is not None:
            for index, part in enumerate(expr.parts):
                yield from _carried(update, part, first, index)
        case _:
            raise ValueError("the release stores it rearranged, and no row of it alone is adapted")


def _nodes(expr: Expr) -> Iterator[Expr]:
    from arch_maps.ops import children

    yield expr
    for child in children(expr):
        yield from _nodes(child)
