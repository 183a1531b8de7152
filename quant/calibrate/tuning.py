"""A block's codes and grids tuned until its outputs come near to the release's own (AutoRound)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arch_maps.ops import RowReader
from quant.calibrate.links import Place, Task, places_of, stored_rows
from quant.calibrate.loading import Shapes
from quant.calibrate.stream import Pass, StreamedModel
from quant.errors import CalibrationError
from quant.tune import TunedMatrix, Tuning

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


@dataclass(kw_only=True)
class BlockCodes:
    """What the matrices of a block are stored as, and the release's tensors as those stand for."""

    tasks: Sequence[Task]
    parts: dict[str, list[dict[str, Array]]]
    """By module, the stored tensors of each matrix."""
    changed: dict[str, Tensor]
    tokens: dict[str, list[int]]
    """By module, how many tokens each matrix of a stack saw."""
    fixed: frozenset[tuple[str, int]]
    """Module and index of matrices that saw too few tokens to be tuned."""
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def arrays(self, prefix: str) -> dict[str, Array]:
        """All of it by name; ``prefix`` is that of the numbers of tokens."""
        found: dict[str, Array] = {n: np.array(v, np.float64) for n, v in self.losses.items()}
        for task in self.tasks:
            for role in self.parts[task.module][0]:
                each = [one[role] for one in self.parts[task.module]]
                found[f"{task.module}.{role}"] = np.stack(each) if task.stacked else each[0]
            if task.stacked:
                found[prefix + task.module] = np.array(self.tokens[task.module], np.int64)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A matrix in the course of tuning, and where its elements are."""

    module: str
    index: int
    shape: tuple[int, int]
    places: list[Place]
    matrix: TunedMatrix


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that become parameters together: their values, and where each element ends up.

    transformers' conversion lets no gradients pass, so they go the way of the elements' numbers.
    """

    group: Any
    values: Mapping[str, Tensor]
    numbers: Mapping[str, Tensor]
    """By parameter; none where the tensor is the parameter."""

    def gradients(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tensors, from those of the parameters; some may be left out."""
        import torch

        if not self.numbers:
            (name,) = self.group.names
            return dict.fromkeys((name,), *parameters.values()) if parameters else {}
        sizes = [value.numel() for value in self.values.values()]
        flat = torch.zeros(sum(sizes))
        for name, gradient in parameters.items():
            flat[self.numbers[name].reshape(-1)] = gradient.reshape(-1)
        each = zip(self.values.items(), torch.split(flat, sizes), strict=True)
        return {name: own.view(value.shape) for (name, value), own in each}


class BlockTuning:
    """Block ``index`` of a release between two passes: the quantized one and the exact one.

    The exact pass was handed the block's answers already. The block must be loaded.
    """

    def __init__(self, streamed: StreamedModel, index: int, run: Pass, exact: Pass) -> None:
        """``run`` and ``exact`` wait for the block and behind it."""
        self._streamed = streamed
        self._index = index
        self._run = run
        self._exact = exact

    def tune(
        self, codes: BlockCodes, reader: RowReader, shapes: Shapes, tuning: Tuning
    ) -> tuple[float, float] | None:
        """Tune ``codes`` in place where that lowers the loss; the loss before and after.

        None for a block with nothing to tune. The loss is the squared error of the block's outputs
        over the sum of their squares. Raises CalibrationError for a block that cannot run again and
        again, or lets no gradient through.
        """
        tensors = {name: value.clone() for name, value in codes.changed.items()}
        pieces = [
            _Piece(
                module=task.module,
                index=index,
                shape=(int(task.expr.shape[-2]), int(task.expr.shape[-1])),
                places=places_of(task, index, shapes),
                matrix=TunedMatrix(
                    stored_rows(task, reader, index), codes.parts[task.module][index], task.spec
                ),
            )
            for task in codes.tasks
            for index in range(task.count)
            if (task.module, index) not in codes.fixed
        ]
        if not pieces:
            return None
        groups = self._groups(tensors)
        before = self._loss(tensors)
        for number in range(tuning.iterations):
            rows = tuning.batch(number, self._run.count)
            gradients = self._descend(groups, rows)
            for piece in pieces:
                _step(piece, tensors, gradients, tuning, number)
        after = self._loss(tensors)
        if not after < before:
            return before, before
        for piece in pieces:
            codes.parts[piece.module][piece.index] = piece.matrix.parts()
        codes.changed.update(tensors)
        return before, after

    def _groups(self, tensors: Mapping[str, Tensor]) -> list[_Group]:
        """What makes parameters of the tensors that change."""
        weights = self._streamed.weights
        found: dict[int, _Group] = {}
        for name in self._streamed.parameters(self._index):
            group = weights.group_of.get(weights.tied.get(name, name))
            if group is None or id(group) in found or tensors.keys().isdisjoint(group.names):
                continue
            values = {n: tensors[n] if n in tensors else weights.read(n) for n in group.names}
            numbers = {}
            if group.converter is not None:
                numbers = weights.convert(group, _numbered(values))
            found[id(group)] = _Group(group, values, numbers)
        return list(found.values())

    def _loss(self, tensors: Mapping[str, Tensor]) -> float:
        import torch

        self._streamed.weights.load(self._streamed.parameters(self._index), tensors)
        error = energy = 0.0
        with torch.no_grad():
            for row in range(self._run.count):
                target = self._exact.handed(row)
                error += float((self._answer(row) - target).square().sum(dtype=torch.float64))
                energy += float(target.square().sum(dtype=torch.float64))
        return error / (energy or 1.0)

    def _descend(self, groups: Sequence[_Group], rows: Sequence[int]) -> dict[str, Tensor]:
        """The gradient of the error on some rows, by the release's tensors."""
        import torch

        held: list[dict[str, Any]] = []
        for group in groups:
            made = self._streamed.weights.convert(group.group, group.values)
            held.append({n: torch.nn.Parameter(value.contiguous()) for n, value in made.items()})
            for name, parameter in held[-1].items():
                self._streamed.weights.put(name, parameter)
        with torch.enable_grad():
            for row in rows:
                loss: Any = (self._answer(row) - self._exact.handed(row)).square().sum()
                try:
                    loss.backward()
                except RuntimeError as error:
                    raise CalibrationError(
                        f"block {self._index} lets no gradient through, which autoround needs "
                        f"({error}); use --q-method gptq"
                    ) from error
        found: dict[str, Tensor] = {}
        for group, parameters in zip(groups, held, strict=True):
            # Experts that no token was sent to have none.
            own = {n: p.grad for n, p in parameters.items() if p.grad is not None}
            found |= group.gradients(own)
        return found

    def _answer(self, row: int) -> Tensor:
        out = self._streamed.compute(self._index, *self._run.call(self._index, row))
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def _step(
    piece: _Piece,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    tuning: Tuning,
    number: int,
) -> None:
    """Move a matrix against the gradients, and put its new values into the tensors."""
    values = np.zeros(piece.shape, np.float32)
    for place in piece.places:
        if place.name in gradients:
            place.get(gradients[place.name], values)
    piece.matrix.step(values, tuning, number)
    piece.matrix.values(values)
    for place in piece.places:
        place.put(tensors[place.name], values)


def _numbered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of all elements, tensor after tensor, in place of their values."""
    import torch

    total = sum(value.numel() for value in values.values())
    kind = torch.int32 if total < 1 << 31 else torch.int64
    sizes = [value.numel() for value in values.values()]
    each = torch.split(torch.arange(total, dtype=kind), sizes)
    return {n: own.view(value.shape) for (n, value), own in zip(values.items(), each, strict=True)}
