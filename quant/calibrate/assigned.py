"""Dense layers by the tensors of the release, for passes that hold whole modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.calibrate.blocks import Blocks
from quant.calibrate.text import CalibrationError
from quant.dotted import shared_end
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A matrix to calibrate: the release's tensor, the runtime's module, and its storage."""

    source: str
    module: str
    dtype: str
    spec: QuantSpec
    table: bool = False
    """An embedding that the head multiplies by."""


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
            ((shared_end(name, path), path) for path in by_leaf.get(name.rpartition(".")[2], ())),
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
