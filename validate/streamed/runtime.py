"""A stock MLX runtime block by block: its own graph, evaluated one block after the other.

MLX computes nothing before it is asked to. The runtime's own code runs, as it stands, on weights
that are not read yet, for every prompt and every single-token step after it; then the model is let
go, and what its blocks gave is computed in the order of the blocks. A block's weights are read when
its first result is asked for, and are freed with its last, because nothing refers to them any more.
So one pass over the weights answers all prompts, and the runtime's caches, masks and positions are
its own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from validate.deviations import without
from validate.fault import Deviation
from validate.runtime import Asked, MlxRuntime, RuntimeRefusal, Steps, numpy_of, refusals
from validate.streamed.slices import large_tables, use_tables
from validate.streamed.stages import Stages

_HELD: Final = 1 << 28
"""Bytes that a model may compute while it is called; more are weights that it holds on to."""


class StreamedRuntime(MlxRuntime):
    """A checkpoint of which one stock runtime holds the weights of one block at a time."""

    def __init__(self, name: str, model: Any, config: Mapping[str, Any], folder: Path) -> None:
        super().__init__(name, model, config, folder)
        self.known: tuple[Deviation, ...] = ()
        """The faults that are taken out of the models that run now."""
        self._source: Path | None = None
        self._dense = False
        self._trust_remote_code = False

    @classmethod
    def load(
        cls, folder: Path, *, runtime: str, trust_remote_code: bool = False, lazy: bool = True
    ) -> Self:
        """As the whole model is loaded, but for the weights; RuntimeRefusal likewise.

        ``model`` stays as loaded: every run has a model of its own.
        """
        loaded = MlxRuntime.load(
            folder, runtime=runtime, trust_remote_code=trust_remote_code, lazy=True
        )
        found = cls(runtime, loaded.model, loaded.config, folder)
        found._trust_remote_code = trust_remote_code
        return found

    def to_float32(self, *, dense: bool, evaluate: bool = False) -> None:
        """Compute in float32 from now on, ``dense`` from unpacked codes; nothing is read yet."""
        self._dense = dense

    @contextmanager
    def without(self, known: Sequence[Deviation], *, source: Path) -> Iterator[None]:
        """Take documented faults out of every model that runs meanwhile."""
        self.known, self._source = tuple(known), source
        try:
            yield
        finally:
            self.known = ()

    def parameters(self) -> dict[str, Any]:
        """Every parameter of a model of its own: what is read goes when the caller drops it."""
        found = self._fresh().parameters()
        gc.collect()  # the model goes, whose modules refer to each other
        return found

    def _fresh(self) -> MlxRuntime:
        return MlxRuntime.load(
            self.folder, runtime=self.name, trust_remote_code=self._trust_remote_code, lazy=True
        )

    def run(self, inputs: Mapping[str, Any], continuation: Sequence[int] = ()) -> Steps:
        """One prompt alone, in a pass of its own."""
        return self.runs([(inputs, continuation)])[0]

    def runs(self, asked: Sequence[Asked]) -> list[Steps]:
        """All prompts and their steps in one pass over the weights."""
        import mlx.core as mx

        before = mx.get_active_memory()
        with refusals(self.name, self.folder):
            stages, results = self._described(asked)
            gc.collect()  # modules refer to each other; from here on the graph alone holds weights
            if mx.get_active_memory() - before > _HELD:
                raise RuntimeRefusal(
                    f"{self.name} cannot run {self.folder.name} block by block: its model computes "
                    "values while it is being called, and so holds the weights that they need"
                )
            stages.evaluate()
            found = []
            while results:
                output, following = results.pop(0)
                found.append(self.steps_of(numpy_of(output), [*map(numpy_of, following)]))
            return found

    def _described(self, asked: Sequence[Asked]) -> tuple[Stages, list[tuple[Any, list[Any]]]]:
        """The graph of every run: its stages, and its results, which nothing has computed yet."""
        fresh = self._fresh()
        stages = Stages()
        tables = large_tables(fresh.model, dense=self._dense)
        fresh.to_float32(dense=self._dense, evaluate=False)
        use_tables(fresh.model, tables, stages)
        results = []
        patched = without(self.known, fresh.model, self.config, source=self._source)
        with patched, stages.watching(fresh.model):
            for inputs, continuation in asked:
                stages.begin()
                output, step = fresh.prefill(inputs)
                rows = []
                for token in continuation[:-1]:
                    stages.begin()
                    rows.append(step(self._row([token]))[0, -1])
                results.append((output[0], rows))
        return stages, results
