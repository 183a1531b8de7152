"""Fusing as a stage of the source: its tensors with the adapter's delta added on row reads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from arch_maps.config import stored_dtype
from arch_maps.ops import RowReader
from converter.adapter.checks import base_note, shape_problems, summary
from converter.adapter.mlx import read_mlx
from converter.adapter.model import Factor, Piece
from converter.adapter.peft import read_peft
from converter.adapter.place import Names, pieces_of
from converter.adapter.read import Adapter
from converter.errors import PlanError
from converter.plan.match import Match
from converter.source import Source

_SLICE = 1 << 22
"""Elements in flight while the norms of a matrix's columns are added up."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A release with an adapter fused in: ``source`` is the view, whose notes say what was done."""

    adapter: Adapter
    source: Source
    pieces: Mapping[str, tuple[Piece, ...]]
    """Updates of each adapted source tensor."""
    whole: Mapping[str, str]
    """Source tensors that the adapter replaces, with its own name for them."""

    def open(self, raw: RowReader) -> FusingReader:
        """A reader of the fused tensors over one of the release's; close it."""
        return FusingReader(raw, self)


def fuse(
    source: Source, match: Match, adapter: Adapter, *, origin: Mapping[str, Any], name: str
) -> Fusion:
    """Account for every tensor of ``adapter``; PlanError naming each that has no place.

    ``origin`` and ``name`` say what the release is called, to compare with the adapter's base.
    Fused tensors are computed in float32 and, where config.json declares no dtype to store them
    in, rounded to their own.
    """
    names = Names(source, match)
    problems: list[str] = []
    pieces: dict[str, list[Piece]] = {}
    whole: dict[str, str] = {}
    if adapter.layout == "peft":
        updates, replaced = read_peft(adapter, problems)
        for update in updates:
            tensor = names.tensor(f"{update.module}.weight")
            if tensor is None:
                problems.append(f"adapter: {update.module}: the release has no such matrix")
                continue
            # A table is stored as its factors say; the map knows which layers are stored [in, out].
            table = update.up.transposed
            fitted = update.flipped if names.transposed(tensor) and not table else update
            rows = int(source.tensors[tensor].shape[0])
            pieces.setdefault(tensor, []).append(Piece(update=fitted, start=0, stop=rows))
        for parameter, own in replaced.items():
            tensor = names.tensor(parameter)
            if tensor is None:
                problems.append(f"adapter: {own}: the release has no tensor {parameter}")
            else:
                whole[tensor] = own
    else:
        updates = []
        for update, rule in read_mlx(adapter, names.rule, problems):
            updates.append(update)
            try:
                for tensor, piece in pieces_of(update, rule.expr):
                    pieces.setdefault(tensor, []).append(piece)
            except ValueError as error:
                problems.append(f"adapter: {update.module}: {error}")
    problems += shape_problems(source, adapter, pieces, whole)
    said = summary(adapter, updates, whole)
    tied = _tied(match, pieces, whole, problems)
    if problems:
        raise PlanError(problems)
    changed = {*pieces, *whole}
    declared = stored_dtype(source.config) is not None
    tensors = {
        n: info._replace(dtype="F32") if n in changed and declared else info
        for n, info in source.tensors.items()
    }
    notes = (said, *tied, *base_note(adapter, origin, name))
    return Fusion(
        adapter=adapter,
        source=replace(source, tensors=tensors, notes=(*source.notes, *notes)),
        pieces={n: tuple(found) for n, found in pieces.items()},
        whole=whole,
    )


class FusingReader:
    """Rows of a release with an adapter's updates added."""

    def __init__(self, raw: RowReader, fusion: Fusion) -> None:
        """Read the release's rows from ``raw`` and the adapter's from its own file."""
        self._raw = raw
        self._fusion = fusion
        self._adapter = fusion.adapter.open()
        self._norms: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._adapter.close()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor: computed in float32, given in the view's dtype."""
        from quant.floats import cast

        if name not in self._fusion.pieces and name not in self._fusion.whole:
            return self._raw.read_rows(name, start, stop)
        value = self._base(name, start, stop)
        for piece in self._fusion.pieces.get(name, ()):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                part = value[low - start : high - start]
                value[low - start : high - start] = self._updated(name, piece, part, low, high)
        return cast(value, self._fusion.source.tensors[name].dtype)

    def _base(self, name: str, start: int, stop: int) -> np.ndarray:
        own = self._fusion.whole.get(name)
        rows = (
            self._raw.read_rows(name, start, stop)
            if own is None
            else self._adapter.read_rows(own, start, stop)
        )
        return np.array(rows, np.float32)

    def _updated(self, name: str, piece: Piece, w: np.ndarray, start: int, stop: int) -> np.ndarray:
        update = piece.update
        added = self._added(piece, w, start, stop)
        if update.magnitude is None:
            return added
        magnitude = self._adapter.read(update.magnitude).reshape(-1).astype(np.float32)
        if update.by_column:
            by_column: np.ndarray = added * (magnitude / self._column_norms(name, piece))
            return by_column
        first = piece.first + start - piece.start
        norms = np.sqrt(np.square(added.astype(np.float64)).sum(axis=1)).astype(np.float32)
        scaled: np.ndarray = added * (magnitude[first : first + len(w)] / norms)[:, None]
        return scaled

    def _added(self, piece: Piece, w: np.ndarray, start: int, stop: int) -> np.ndarray:
        """``w`` with the low-rank product added, which is summed in float64 and rounded once."""
        first = piece.first + start - piece.start
        up = self._factor(piece.update.up, piece.expert)[first : first + stop - start]
        down = self._factor(piece.update.down, piece.expert)
        delta = (up.astype(np.float64) @ down.astype(np.float64)) * piece.update.scale
        return w + delta.astype(np.float32)

    def _factor(self, factor: Factor, expert: int | None) -> np.ndarray:
        if expert is None:
            found = self._adapter.read(factor.name)
        else:
            found = self._adapter.read_rows(factor.name, expert, expert + 1)[0]
        return found.T if factor.transposed else found

    def _column_norms(self, name: str, piece: Piece) -> np.ndarray:
        with self._lock:
            if name not in self._norms:
                total: np.ndarray = np.zeros(1)
                columns = int(self._fusion.source.tensors[name].shape[1])
                step = max(1, _SLICE // columns)
                for start in range(piece.start, piece.stop, step):
                    stop = min(piece.stop, start + step)
                    added = self._added(piece, self._base(name, start, stop), start, stop)
                    total = total + np.square(added.astype(np.float64)).sum(axis=0)
                self._norms[name] = np.sqrt(total).astype(np.float32)
            return self._norms[name]


def _tied(
    match: Match,
    pieces: dict[str, list[Piece]],
    whole: dict[str, str],
    problems: list[str],
) -> list[str]:
    """Let a dropped copy of an adapted table change with it; refuse updates of other drops."""
    notes = []
    for drop in match.drops:
        mine = drop.name in pieces or drop.name in whole
        if mine:
            problems.append(
                f"adapter: adapts {drop.name}, which the conversion drops: {drop.reason}"
            )
        elif drop.same_as is not None and (drop.same_as in pieces or drop.same_as in whole):
            if drop.same_as in pieces:
                pieces[drop.name] = pieces[drop.same_as]
            if drop.same_as in whole:
                whole[drop.name] = whole[drop.same_as]
            notes.append(f"{drop.name} is tied to {drop.same_as}, which the adapter changes")
    return notes
