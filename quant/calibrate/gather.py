"""Statistics of a release on calibration rows: second moments, and GPTQ's codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.ops import sources
from quant.calibrate.coding import FEW_TOKENS, TOKENS, Coder, by_block, links_of
from quant.calibrate.links import Task
from quant.calibrate.loading import Shapes
from quant.calibrate.passes import Pass
from quant.calibrate.products import Key, Moments, watching
from quant.calibrate.store import Statistics, Store
from quant.calibrate.stream import StreamedModel
from quant.calibrate.text import CalibrationError
from quant.calibrate.tuning import BlockTuning, threads
from quant.tune import Tuning

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Rows = Sequence[Mapping[str, "Tensor"]]
LOOKED_UP: Final = 0.3
"""Share of equal column weights for a tied table: as an embedding, all its columns count alike."""
HESSIAN: Final = "hessian:"
TUNED: Final = "tuned:"
_HEAD: Final[Key] = ("head", None)


class Gathering:
    """A streamed release, the matrices to calibrate and the rows to do it on."""

    def __init__(
        self,
        streamed: StreamedModel,
        tasks: Sequence[Task],
        rows: Rows,
        reader: Any,
        shapes: Shapes,
    ) -> None:
        """``reader`` and ``shapes`` give the release's tensors, as in ``streamed``."""
        self.streamed = streamed
        self.rows = rows
        self.reader = reader
        self.shapes = shapes
        self._coder = Coder(streamed, reader, shapes)
        self._head = self._head_task(tasks)
        self._of_block = self._sorted(tasks)

    def moments(self, store: Store, *, width: int) -> Statistics:
        """Mean x x^T in blocks of up to ``width`` columns, by module; no weight is changed.

        Stacks have one for each matrix, and ``tokens:<module>`` says how many tokens each saw. A
        matrix that no product stands for is left out. The table that the head multiplies by has
        its whole matrix as ``hessian:<module>``. Goes on where an earlier call was interrupted.
        """
        streamed = self.streamed
        first, states = store.begun()
        with self._pass(first, states) as run:
            for index in range(first, len(streamed.blocks)):
                found = Moments(width=width)
                with streamed.loaded(index):
                    with watching(self.streamed.held(index), found.add):
                        run.forward(index, keep=True, after=found.forget)
                    arrays = self._block_moments(index, found)
                self._put(store, index, arrays, run)
            store.put(len(streamed.blocks), self._head_moments(run, width))
        return store.finish(len(streamed.blocks) + 1)

    def codes(
        self, store: Store, moments: Statistics | None, tuning: Tuning | None = None
    ) -> Statistics:
        """The stored tensors of every task by name, ``<module>.weight`` and so on, by GPTQ.

        Each block sees the outputs of the quantized blocks before it, and of the quantized table,
        for which ``moments`` of the same rows are needed. With ``tuning`` a block's codes and grids
        are then tuned towards what the release's own block answers in the release, and
        ``tuned:<block>`` holds its loss before and after; where it did not fall, GPTQ's stay. Goes
        on where an earlier call was interrupted.
        """
        streamed = self.streamed
        count = len(streamed.blocks)
        head = self._head
        table: dict[str, Array] = {}
        first, states = store.begun()
        with ExitStack() as stack:
            exact = None
            pool = stack.enter_context(threads())
            if tuning is not None:  # before the table is replaced
                exact = stack.enter_context(self._pass(first, states[len(self.rows) :]))
            if head is not None and head.table:
                assert moments is not None, "a tied table is quantized by its moments"
                matrix = moments[HESSIAN + head.module].astype(np.float64)
                (found,), changed = self._coder.quantized(head, [matrix])
                table = {f"{head.module}.{role}": part for role, part in found.items()}
                streamed.weights.replaced = changed
                streamed.release_rest()  # the table may be there from an earlier pass
            run = stack.enter_context(self._pass(first, states[: len(self.rows)]))
            for index in range(first, count):
                with streamed.loaded(index):
                    if exact is not None:
                        exact.forward(index, keep=True)
                    block, changed = self._coder.block(run, index, self._of_block.get(index, ()))
                    streamed.weights.load(streamed.parameters(index), changed)
                    del changed  # as wide as the block
                    if exact is not None and tuning is not None:
                        losses = BlockTuning(streamed, index, run, exact, pool).tune(
                            block, self.reader, self.shapes, tuning
                        )  # kept by no name: it holds the block's parameters
                        if losses is not None:
                            block.losses[f"{TUNED}{streamed.path}.{index}"] = losses
                    run.forward(index, keep=True)
                runs = [run] if exact is None else [run, exact]
                self._put(store, index, block.arrays(), *runs)
            last = dict(table)
            if head is not None and not head.table:
                seen = self._head_inputs(run, None).mean(_HEAD)
                (found,), _ = self._coder.quantized(head, [seen])
                last = {f"{head.module}.{role}": part for role, part in found.items()}
            store.put(count, last)
        return store.finish(count + 1)

    @contextmanager
    def _pass(self, first: int, states: Sequence[Mapping[str, Tensor]]) -> Iterator[Pass]:
        """A pass over all rows, at block ``first`` where an earlier one had ``states``."""
        with self.streamed.run(self.rows, until_head=self.streamed.head is not None) as run:
            if first:
                run.resume(first, states)
            yield run

    def _put(self, store: Store, index: int, arrays: Mapping[str, Array], *runs: Pass) -> None:
        more = index + 1 < len(self.streamed.blocks)
        states = (state for run in runs for state in run.states(index + 1))
        store.put(index, arrays, states if more and all(run.plain for run in runs) else None)

    def _block_moments(self, index: int, found: Moments) -> dict[str, Array]:
        links = links_of(self.streamed, self.shapes, index, found.axes)
        arrays: dict[str, Array] = {}
        for task in self._of_block.get(index, ()):
            feeds = links.feeds(task)
            if feeds is None:
                continue
            tokens = [found.tokens.get(key, 0) for key in feeds]
            means = []
            for key, count in zip(feeds, tokens, strict=True):
                few = key[1] is not None and count < FEW_TOKENS
                mean = found.pooled(key[0]) if few else found.mean(key)
                assert mean is not None, f"{key}: no products"
                means.append(mean.astype(np.float32))
            arrays[task.module] = np.stack(means) if task.stacked else means[0]
            if task.stacked:
                arrays[TOKENS + task.module] = np.array(tokens, np.int64)
        return arrays

    def _head_inputs(self, run: Pass, width: int | None) -> Moments:
        found = Moments(width=width)
        for x in run.results():
            found.add(_HEAD, 1, x)
            found.forget()
        return found

    def _head_moments(self, run: Pass, width: int) -> dict[str, Array]:
        from quant.calibrate.products import block_width
        from quant.moments import diagonal_blocks

        task = self._head
        if task is None:
            return {}
        if self.streamed.head is None:
            matrix: Array = np.eye(int(task.expr.shape[-1]))
        else:
            seen = self._head_inputs(run, None).mean(_HEAD)
            assert seen is not None, "there are rows"
            matrix = seen
        if task.table:
            matrix = matrix / (np.diagonal(matrix).mean() or 1.0)
            matrix = matrix + LOOKED_UP * np.eye(len(matrix))
        size = block_width(len(matrix), width)
        assert size is not None, "a width was given"
        found = {task.module: diagonal_blocks(matrix, size)}
        if task.table:
            found[HESSIAN + task.module] = matrix.astype(np.float32)
        return found

    def _head_task(self, tasks: Sequence[Task]) -> Task | None:
        """The task of the output projection, or of the table that it shares."""
        tables = [task for task in tasks if task.table]
        if tables:
            return tables[0]
        names = {id(module): path for path, module in self.streamed.model.named_modules()}
        path = names.get(id(self.streamed.head))
        group = self.streamed.weights.group_of.get(f"{path}.weight") if path else None
        for task in tasks:
            if group is not None and {leaf.name for leaf in sources(task.expr)} & set(group.names):
                return task
        return None

    def _sorted(self, tasks: Sequence[Task]) -> dict[int, list[Task]]:
        """Tasks by the block that their tensors belong to; raises CalibrationError for none."""
        found = by_block(self.streamed, [task for task in tasks if task is not self._head])
        if tasks and not found:
            raise CalibrationError(
                f"none of the {len(tasks)} matrices belongs to a block of "
                f"{type(self.streamed.model).__name__}; use --q-method search"
            )
        return found
