"""What linear layers see on calibration text: mean squares, mean outer products, GPTQ's codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from quant.calibrate.blocks import Blocks
from quant.calibrate.store import Statistics
from quant.calibrate.text import CalibrationError
from quant.recipe import QuantSpec

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
LOOKED_UP: Final = 0.3
"""Share of equal column weights for a tied table: as an embedding, all its columns count alike."""
HESSIAN: Final = "hessian:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A matrix to calibrate: the release's tensor, the runtime's module, and its storage."""

    source: str
    module: str
    dtype: str
    spec: QuantSpec
    table: bool = False
    """An embedding that the head multiplies by."""


class Moments:
    """The mean over tokens of x^2, or of x x^T, for each module by path; sums are in float64."""

    def __init__(self, *, outer: bool) -> None:
        """``outer`` collects whole matrices."""
        self.outer = outer
        self._sums: dict[str, Tensor] = {}
        self._same: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._recent: list[tuple[Tensor, str]] = []

    def add(self, path: str, x: Tensor) -> None:
        """Count the inputs ``x`` (..., cols) of the module ``path``."""
        import torch

        for other, leader in self._recent:  # query, key and value share one input
            if other is x:
                self._same[path] = leader
                return
        self._recent = [*self._recent[-7:], (x, path)]
        flat = x.reshape(-1, x.shape[-1]).float()
        found = flat.T @ flat if self.outer else flat.square().sum(0, dtype=torch.float64)
        total = self._sums.setdefault(path, torch.zeros(found.shape, dtype=torch.float64))
        total += found
        self._tokens[path] = self._tokens.get(path, 0) + flat.shape[0]

    def mean(self, path: str) -> Array:
        """The mean in float64; raises CalibrationError where no input came or none is finite."""
        leader = self._same.get(path, path)
        if leader not in self._sums:
            raise CalibrationError(f"{path}: saw no calibration token; use --q-method search")
        value: Array = (self._sums[leader] / self._tokens[leader]).numpy()
        if not np.isfinite(value).all():
            raise CalibrationError(f"{path}: its activations on the calibration text overflow")
        return value

    @contextmanager
    def watching(self, modules: Mapping[str, Any]) -> Iterator[None]:
        """Count what goes into ``modules`` while the context is open."""

        def hook(path: str) -> Callable[..., None]:
            return lambda module, given: self.add(path, given[0])

        hooks = [m.register_forward_pre_hook(hook(path)) for path, m in modules.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def column_weights(blocks: Blocks, tasks: Sequence[Task]) -> dict[str, Array]:
    """Mean squares of the inputs in float32, by source tensor; no weight is changed.

    For a tied table also the head's matrix, as ``hessian:<tensor>``. A table that no head reads
    gets ones.
    """
    owners, head = assigned(blocks, tasks)
    weights: dict[str, Array] = {}
    blocks.start()
    for index in range(len(blocks.blocks)):
        modules = {p: m for p, m in blocks.linears(index).items() if p in owners}
        moments = Moments(outer=False)
        with moments.watching(modules):
            blocks.run(index, keep=True)
        for path in modules:
            weights[owners[path].source] = moments.mean(path).astype(np.float32)
        blocks.release(index)
    if head is not None and blocks.head is None:
        size = blocks.model.get_input_embeddings().weight.shape[1]
        weights[head.source] = np.ones(size, np.float32)
        weights[HESSIAN + head.source] = np.eye(size, dtype=np.float32)
    elif head is not None:
        matrix = _head_matrix(blocks)
        weights[head.source] = np.diagonal(matrix).astype(np.float32)
        if head.table:
            weights[HESSIAN + head.source] = matrix.astype(np.float32)
    return weights


def gptq_parts(blocks: Blocks, tasks: Sequence[Task], statistics: Statistics) -> dict[str, Array]:
    """The stored tensors of every task by name, ``<module>.weight`` and so on.

    Each block sees the outputs of the quantized blocks before it, and of the quantized table.
    ``statistics`` are the ``column_weights`` of the same text.
    """
    from quant.gptq import quantize_gptq
    from quant.weights import dequantize_rows

    owners, head = assigned(blocks, tasks)
    parts: dict[str, Array] = {}

    def quantize(task: Task, module: Any, matrix: Array) -> None:
        w = _stored(module.weight, task.dtype)
        found = quantize_gptq(w, task.spec, matrix)
        parts.update({f"{task.module}.{role}": part for role, part in found.items()})
        wide = {r: p.astype(np.float32) if r == "biases" else p for r, p in found.items()}
        if task.spec.mode == "affine":
            wide["scales"] = found["scales"].astype(np.float32)
        _assign(module.weight, dequantize_rows(wide, task.spec, "F32"))

    if head is not None and head.table:
        matrix = np.array(statistics[HESSIAN + head.source], np.float64)
        matrix /= np.diagonal(matrix).mean() or 1.0
        matrix += LOOKED_UP * np.eye(len(matrix))
        quantize(head, blocks.model.get_input_embeddings(), matrix)
    blocks.start()
    for index in range(len(blocks.blocks)):
        modules = {p: m for p, m in blocks.linears(index).items() if p in owners}
        moments = Moments(outer=True)
        with moments.watching(modules):
            blocks.run(index, keep=False)
        for path, module in modules.items():
            quantize(owners[path], module, moments.mean(path))
        del moments
        blocks.run(index, keep=True)
        blocks.release(index)
    if head is not None and not head.table:
        quantize(head, blocks.head, _head_matrix(blocks))
    return parts


def assigned(blocks: Blocks, tasks: Sequence[Task]) -> tuple[dict[str, Task], Task | None]:
    """Which task each dense layer of the blocks answers for, and the head's or table's task.

    A layer is the one whose path shares the longest end with the tensor's name. Raises
    CalibrationError for a tensor that no layer, or more than one, answers for.
    """
    linears = {
        path: module
        for index in range(len(blocks.blocks))
        for path, module in blocks.linears(index).items()
    }
    by_leaf: dict[str, list[str]] = {}
    for path in linears:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    owners: dict[str, Task] = {}
    head: Task | None = None
    lost: list[str] = []
    for task in tasks:
        name = task.source.removesuffix(".weight")
        if task.table or name.endswith(blocks.head_name):
            head = task
            continue
        ranked = sorted(
            ((_shared(name, path), path) for path in by_leaf.get(name.rpartition(".")[2], ())),
            reverse=True,
        )
        clear = ranked and (len(ranked) == 1 or ranked[0][0] > ranked[1][0])
        if not clear or ranked[0][1] in owners:
            lost.append(task.source)
        else:
            owners[ranked[0][1]] = task
    if lost:
        raise CalibrationError(
            f"{len(lost)} tensors have no dense layer of their own in "
            f"{type(blocks.model).__name__}, such as {lost[0]}; use --q-method search"
        )
    return owners, head


def _shared(a: str, b: str) -> int:
    """How many dotted words two names share at their ends."""
    count = 0
    for x, y in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if x != y:
            break
        count += 1
    return count


def _head_matrix(blocks: Blocks) -> Array:
    moments = Moments(outer=True)
    for x in blocks.head_inputs():
        moments.add("head", x)
    return moments.mean("head")


def _stored(weight: Tensor, dtype: str) -> Array:
    from quant.floats import cast

    wide: Array = weight.detach().float().numpy()
    return np.ascontiguousarray(cast(wide, dtype))


def _assign(weight: Any, values: Array) -> None:
    import torch

    weight.data = torch.from_numpy(np.ascontiguousarray(values, np.float32))
