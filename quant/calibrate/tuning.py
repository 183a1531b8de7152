"""A block's codes and grids tuned until its outputs come near to the release's own (AutoRound)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from arch_maps.ops import RowReader
from quant.calibrate.bounds import GRADIENT_BYTES
from quant.calibrate.calls import first
from quant.calibrate.coding import BlockCodes
from quant.calibrate.leaves import Leaves
from quant.calibrate.links import Task, places_of, stored_rows
from quant.calibrate.loading import Shapes
from quant.calibrate.passes import Pass
from quant.calibrate.slots import Leaf, Slot, Slots
from quant.calibrate.stream import StreamedModel
from quant.errors import CalibrationError
from quant.gptq import values_of
from quant.tune import TunedMatrix, Tuning

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
T = TypeVar("T")


_THREADS: Final = 8
"""Sequences at a time, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A matrix in the course of tuning, and where its elements are."""

    task: Task
    index: int
    slots: list[Slot]
    matrix: TunedMatrix

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.task.expr.shape[-2:]
        return int(rows), int(columns)

    @property
    def leaves(self) -> frozenset[Leaf]:
        return frozenset(slot.leaf for slot in self.slots)


class BlockTuning:
    """Block ``index`` of a release between two passes: the quantized one and the exact one.

    The exact pass was handed the block's answers already. The block must be loaded as quantized;
    its parameters are changed where they lie.
    """

    def __init__(
        self, streamed: StreamedModel, index: int, run: Pass, exact: Pass, pool: ThreadPoolExecutor
    ) -> None:
        """``run`` and ``exact`` wait for the block and behind it; ``pool``: :func:`threads`."""
        self._streamed = streamed
        self._index = index
        self._run = run
        self._exact = exact
        self._pool = pool
        self._leaves = Leaves(streamed.weights, streamed.parameters(index))

    def tune(
        self, codes: BlockCodes, reader: RowReader, shapes: Shapes, tuning: Tuning
    ) -> tuple[float, float] | None:
        """Tune ``codes`` in place where that lowers the loss; the loss before and after.

        None for a block with nothing to tune. The loss is the squared error of the block's outputs
        over the sum of their squares. Raises CalibrationError for a block that cannot run again and
        again, or lets no gradient through.
        """
        pieces = self._pieces(codes, reader, shapes)
        if not pieces:
            return None
        parts = list(_parts(pieces, self._leaves))
        before = self._loss()
        for number in range(tuning.iterations):
            rows, any_at_all = tuning.batch(number, self._run.count), False
            for part in parts:  # all at the same point, so that it does not matter how many
                gradients = self._gradients(part, rows)
                any_at_all = any_at_all or bool(gradients)
                for piece in part:
                    piece.matrix.step(_collected(piece, gradients), tuning, number)
                del gradients  # as wide as the part, and more of them are found next
            if not any_at_all:
                raise self._refusal("")
            for piece in pieces:
                values = np.empty(piece.shape, np.float32)
                piece.matrix.values(values)
                self._write(piece, values)
        after = self._loss()
        better = after < before
        for piece in pieces:
            own = codes.parts[piece.task.module]
            if better:
                own[piece.index] = piece.matrix.parts()
            else:
                self._write(piece, values_of(own[piece.index], piece.task.spec))
        return before, after if better else before

    def _pieces(self, codes: BlockCodes, reader: RowReader, shapes: Shapes) -> list[_Piece]:
        """The matrices to tune; those that share leaves follow one another."""
        slots = Slots(self._streamed.weights, shapes)
        located = [
            (task, index, slots.of(places_of(task, index, shapes)))
            for task in codes.tasks
            for index in range(task.count)
            if (task.module, index) not in codes.fixed
        ]
        del slots  # as large as the widest stack
        located.sort(key=lambda one: min((n, e or 0) for n, e in (slot.leaf for slot in one[2])))
        return [
            _Piece(
                task=task,
                index=index,
                slots=own,
                matrix=TunedMatrix(
                    stored_rows(task, reader, index), codes.parts[task.module][index], task.spec
                ),
            )
            for task, index, own in located
        ]

    def _write(self, piece: _Piece, values: Array) -> None:
        for slot in piece.slots:
            slot.put(self._leaves[slot.leaf], values)

    def _loss(self) -> float:
        import torch

        def one(row: int) -> tuple[float, float]:
            with torch.no_grad():
                target = self._exact.handed(row)
                error = (self._answer(row) - target).square().sum(dtype=torch.float64)
                return float(error), float(target.square().sum(dtype=torch.float64))

        error = energy = 0.0
        for own, norm in self._each_row(one, range(self._run.count), _THREADS):
            error += own
            energy += norm
        return error / (energy or 1.0)

    def _gradients(self, part: Sequence[_Piece], rows: Sequence[int]) -> dict[Leaf, Tensor]:
        """The gradient of the error on some rows, by leaf; none of experts without a token."""
        import torch

        wanted = sorted({leaf for piece in part for leaf in piece.leaves}, key=str)
        size = sum(_bytes(self._leaves, leaf) for leaf in wanted)

        def one(row: int) -> dict[Leaf, Tensor]:
            with torch.enable_grad():
                loss: Any = (self._answer(row) - self._exact.handed(row)).square().sum()
                if not loss.requires_grad:  # no token of this row came to these experts
                    return {}
                try:
                    return self._leaves.gradients(loss, wanted)
                except RuntimeError as error:
                    raise self._refusal(f" ({error})") from error

        found: dict[Leaf, Tensor] = {}
        with self._leaves.differentiable(wanted):
            at_once = max(1, GRADIENT_BYTES // max(1, size))
            for own in self._each_row(one, rows, min(_THREADS, at_once)):
                for leaf, gradient in own.items():
                    found[leaf] = found[leaf] + gradient if leaf in found else gradient
        return found

    def _refusal(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"block {self._index} lets no gradient through, which autoround needs{why}; use "
            "--q-method gptq"
        )

    def _each_row(self, one: Callable[[int], T], rows: Sequence[int], most: int) -> Iterator[T]:
        """``one`` of each row, in their order: on as many cores, each of them a thread of torch's.

        A row's sums are the same on any thread, and rows are added up in order.
        """
        workers = min(most, len(rows), cores())
        if workers == 1:
            yield from map(one, rows)
            return
        waiting: deque[Future[T]] = deque()
        for row in rows:
            waiting.append(self._pool.submit(one, row))
            if len(waiting) == workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _answer(self, row: int) -> Tensor:
        call = self._run.copied(self._index, row)
        found: Tensor = first(self._streamed.compute(self._index, call))
        return found


def threads() -> ThreadPoolExecutor:
    """Threads for rows of all blocks: each new one would leave memory that is not given back."""
    return ThreadPoolExecutor(min(_THREADS, cores()))


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parts(pieces: Sequence[_Piece], leaves: Leaves) -> Iterator[list[_Piece]]:
    """Matrices in lots whose leaves' gradients stay within ``GRADIENT_BYTES``, or one each."""
    part: list[_Piece] = []
    held: set[Leaf] = set()
    size = 0
    for piece in pieces:
        more = sum(_bytes(leaves, leaf) for leaf in piece.leaves - held)
        if part and size + more > GRADIENT_BYTES:
            yield part
            part, held, size = [], set(), 0
            more = sum(_bytes(leaves, leaf) for leaf in piece.leaves)
        part.append(piece)
        held |= piece.leaves
        size += more
    if part:
        yield part


def _bytes(leaves: Leaves, leaf: Leaf) -> int:
    found: int = leaves[leaf].nbytes
    return found


def _collected(piece: _Piece, gradients: Mapping[Leaf, Tensor]) -> Array:
    """The gradient of a matrix's elements, 0 where there is none."""
    found = np.zeros(piece.shape, np.float32)
    for slot in piece.slots:
        if slot.leaf in gradients:
            slot.get(gradients[slot.leaf], found)
    return found
