"""GPTQ's codes of one block, from what its matrices multiply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.ops import RowReader, sources
from quant.calibrate.bounds import HESSIAN_BYTES
from quant.calibrate.links import Links, Task, places_of, stored_rows
from quant.calibrate.loading import Shapes
from quant.calibrate.memory import give_back
from quant.calibrate.passes import Pass
from quant.calibrate.products import Key, Moments, watching
from quant.calibrate.stream import StreamedModel

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
FEW_TOKENS: Final = 32
"""An expert that saw fewer is judged by what all experts of its layer saw together."""
TOKENS: Final = "tokens:"


@dataclass(kw_only=True)
class BlockCodes:
    """What the matrices of a block are stored as."""

    tasks: Sequence[Task]
    parts: dict[str, list[dict[str, Array]]]
    """By module, the stored tensors of each matrix."""
    tokens: dict[str, list[int]]
    """By module, how many tokens each matrix of a stack saw."""
    fixed: frozenset[tuple[str, int]]
    """Module and index of matrices that saw too few tokens to be tuned."""
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """All of it by name."""
        found: dict[str, Array] = {n: np.array(v, np.float64) for n, v in self.losses.items()}
        for task in self.tasks:
            for role in self.parts[task.module][0]:
                each = [one[role] for one in self.parts[task.module]]
                found[f"{task.module}.{role}"] = np.stack(each) if task.stacked else each[0]
            if task.stacked:
                found[TOKENS + task.module] = np.array(self.tokens[task.module], np.int64)
        return found


class Coder:
    """What quantizes matrices of a streamed release by GPTQ."""

    def __init__(self, streamed: StreamedModel, reader: RowReader, shapes: Shapes) -> None:
        """``reader`` and ``shapes`` give the release's tensors, as in ``streamed``."""
        self._streamed = streamed
        self._reader = reader
        self._shapes = shapes

    def block(
        self, run: Pass, index: int, tasks: Sequence[Task]
    ) -> tuple[BlockCodes, dict[str, Tensor]]:
        """Codes of a loaded block's tasks, and the release's tensors as they stand for.

        ``run`` waits for the block, and still does afterwards.
        """
        seen = Moments(width=16)
        parameters = self._streamed.held(index)
        alone = all(p.ndim < 3 for p in parameters.values())
        with watching(parameters, seen.add):
            run.forward(index, keep=False, rows=1 if alone else None, after=seen.forget)
        links = links_of(self._streamed, self._shapes, index, seen.axes)
        served = [(t, f) for t in tasks if (f := links.feeds(t))]
        wanted: dict[Key, None] = {}
        used: dict[str, list[Key]] = {}
        for task, feeds in served:
            used[task.module] = [
                (n, -1) if e is not None and seen.tokens.get((n, e), 0) < FEW_TOKENS else (n, e)
                for n, e in feeds
            ]
            wanted |= dict.fromkeys(used[task.module])
        columns = {key[0]: size for key, size in seen.columns.items()}
        parts: dict[str, list[dict[str, Array]]] = {t.module: [{}] * t.count for t, _ in served}
        changed: dict[str, Tensor] = {}
        for batch in _batches(list(wanted), columns):
            found = Moments(width=None, wanted=batch)
            with watching(parameters, found.add):
                run.forward(index, keep=False, after=found.forget)
            found.divide()
            give_back()  # of the passes and of the block before: factors take the most
            for task, _ in served:
                mine = [i for i, key in enumerate(used[task.module]) if key in batch]
                if not mine:
                    continue
                means = [found.mean(used[task.module][i]) for i in mine]
                made, now = self.quantized(task, means, mine, changed)
                changed |= now
                for i, one in zip(mine, made, strict=True):
                    parts[task.module][i] = one
        codes = BlockCodes(
            tasks=[task for task, _ in served],
            parts=parts,
            tokens={t.module: [seen.tokens.get(key, 0) for key in feeds] for t, feeds in served},
            fixed=frozenset(
                (module, i)
                for module, keys in used.items()
                for i, key in enumerate(keys)
                if key[1] == -1
            ),
        )
        return codes, changed

    def quantized(
        self,
        task: Task,
        matrices: Sequence[Array | None],
        indices: Sequence[int] = (0,),
        changed: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[dict[str, Array]], dict[str, Tensor]]:
        """Stored tensors of some matrices of a task, and the release's tensors with them put in.

        ``changed`` are tensors that other matrices were put into already.
        """
        from quant.gptq import quantize_gptq, values_of

        names = {leaf.name for leaf in sources(task.expr)}
        now = {n: value for n, value in (changed or {}).items() if n in names}
        made = []
        for index, matrix in zip(indices, matrices, strict=True):
            w = stored_rows(task, self._reader, index)
            assert matrix is not None, f"{task.module}: no products"
            found = quantize_gptq(w, task.spec, matrix)
            values = values_of(found, task.spec)
            made.append(found)
            for place in places_of(task, index, self._shapes):
                if place.name not in now:
                    now[place.name] = self._streamed.weights.read(place.name)
                place.put(now[place.name], values)
        return made, now


def links_of(streamed: StreamedModel, shapes: Shapes, index: int, seen: Mapping[Key, int]) -> Links:
    """Links of a block; what holds for one expert's matrix holds for all of its stack.

    ``seen`` are the summed axes of the products that were seen.
    """
    axes = dict(seen)
    parameters = streamed.held(index)
    for (name, expert), axis in seen.items():
        if expert is not None:
            axes |= {(name, other): axis for other in range(len(parameters[name]))}
    return Links(streamed.weights, shapes, axes)


def by_block(streamed: StreamedModel, tasks: Sequence[Task]) -> dict[int, list[Task]]:
    """Tasks by the block that all their tensors belong to; others are left out."""
    block_of = {
        name: index
        for index in range(len(streamed.blocks))
        for parameter in streamed.parameters(index)
        if (group := streamed.weights.group_of.get(parameter)) is not None
        for name in group.names
    }
    found: dict[int, list[Task]] = {}
    for task in tasks:
        blocks = {block_of.get(leaf.name) for leaf in sources(task.expr)}
        if len(blocks) == 1 and (only := blocks.pop()) is not None:
            found.setdefault(only, []).append(task)
    return found


def _batches(keys: Sequence[Key], columns: Mapping[str, int]) -> Iterator[frozenset[Key]]:
    """Keys in lots whose whole matrices stay within ``HESSIAN_BYTES``, or one each."""
    batch: list[Key] = []
    size = 0
    for key in keys:
        own = 8 * columns[key[0]] ** 2
        if batch and size + own > HESSIAN_BYTES:
            yield frozenset(batch)
            batch, size = [], 0
        batch.append(key)
        size += own
    if batch:
        yield frozenset(batch)
