"""A transformers model run block by block: one block's weights at a time, all sequences abreast.

Every sequence runs the model's own forward pass, in a thread that stops where a block is called.
Block by block the weights are read, the block computes for each sequence in turn, and its weights
are given up. Whatever the model does before, between and after its blocks is its own code, so the
numbers are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from arch_maps.ops import RowReader
from quant.calibrate.bounds import TABLE_BYTES
from quant.calibrate.calls import Call
from quant.calibrate.loading import Shapes, Weights, empty_model
from quant.calibrate.lookups import look_up
from quant.calibrate.passes import Pass
from quant.calibrate.rows import BlockError as BlockError
from quant.calibrate.rows import stand_in

_FLOAT: Final = 4


class StreamedModel:
    """A release as torch modules whose weights are there only while they compute, in float32."""

    def __init__(
        self,
        folder: Path,
        reader: RowReader,
        shapes: Shapes,
        *,
        trust_remote_code: bool = False,
        model: Any = None,
        apart: Container[str] = (),
    ) -> None:
        """Build the model of ``folder``'s config; ``reader`` and ``shapes`` give its tensors.

        ``model`` is one that is built already, without weights. The modules at the paths in
        ``apart`` get theirs from whoever names them; large embeddings inside blocks read the rows
        that they are asked for. Raises CalibrationError
        where transformers cannot build it, BlockError where it has no list of blocks.
        """
        if model is None:
            model = empty_model(folder, trust_remote_code=trust_remote_code)
        self.model = model
        self._apart = apart
        self.path, self.blocks = _block_list(self.model)
        self.weights = Weights(self.model, reader, shapes)
        self._inside = {n for n in self.weights.names if n.startswith(f"{self.path}.")}
        looked_up = set(self._look_up())
        self._names = [
            [
                name
                for name in self.weights.names
                if name.startswith(f"{self.path}.{index}.")
                and name not in looked_up
                and name.rpartition(".")[0] not in apart
            ]
            for index in range(len(self.blocks))
        ]
        self._forwards = [block.forward for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = stand_in(index)
        self._load_on_demand()

    def parameters(self, index: int) -> list[str]:
        """Names of the parameters of block ``index``."""
        return self._names[index]

    def held(self, index: int) -> dict[str, Any]:
        """The parameters of block ``index`` as they are now, by name."""
        return {name: self.weights.value(name) for name in self._names[index]}

    @contextmanager
    def loaded(self, index: int) -> Iterator[Any]:
        """Block ``index`` with its weights, which are gone afterwards."""
        self.weights.load(self._names[index])
        try:
            yield self.blocks[index]
        finally:
            self.weights.release(self._names[index])

    def compute(self, index: int, call: Call) -> Any:
        """What block ``index`` answers; its weights must be loaded."""
        return self._forwards[index](*call.positional, **call.named)

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        until_head: bool = False,
        threads: int | None = 1,
        gradients: bool = False,
    ) -> Pass:
        """Begin a pass over ``rows``, each the keyword arguments of one forward call.

        ``until_head`` ends every row where the output projection is called; the result is then
        what that projection was given. torch computes on ``threads``, None for as many as before.
        With ``gradients`` they pass what the model does around its blocks.
        """
        head = self.head if until_head else None
        return Pass(self, rows, head=head, threads=threads, gradients=gradients)

    def stop_at(self, module: Any) -> int:
        """Make a module that is called after all blocks one more block; its index."""
        index = len(self.blocks)
        module.forward = stand_in(index)
        return index

    @property
    def head(self) -> Any:
        """The output projection, or None."""
        return self.model.get_output_embeddings()

    def release_rest(self) -> None:
        """Give up the weights outside the blocks; they come back when they are needed."""
        self.weights.release([n for n in self.weights.names if n not in self._inside])

    def load_rest(self) -> None:
        """Read the weights outside the blocks now, but for the output projection's.

        Picture towers ask parameters of modules inside them where they are, before those run.
        """
        later = {f"{path}.{leaf}" for path in self._later() for leaf in ("weight", "bias")}
        outside = self.weights.names - self._inside - later
        tied = self.weights.tied
        self.weights.load(n for n in outside if tied.get(n, n) in self.weights.group_of)

    def _later(self) -> Iterator[str]:
        for path, module in self.model.named_modules():
            if module is self.head or path in self._apart:
                yield path

    def _look_up(self) -> Iterator[str]:
        """Let the large embeddings inside blocks read their rows; the names of their weights."""
        from torch import nn

        for path, module in self.blocks.named_modules(prefix=self.path):
            if not isinstance(module, nn.Embedding) or path in self._apart:
                continue
            read = self.weights.rows_of(f"{path}.weight")
            if _FLOAT * module.weight.numel() > TABLE_BYTES and read is not None:
                look_up(module, read)
                yield f"{path}.weight"

    def _load_on_demand(self) -> None:
        outside: dict[str, list[str]] = {}
        for name in sorted(self.weights.names - self._inside):
            outside.setdefault(name.rpartition(".")[0], []).append(name)
        for path, names in outside.items():
            if path in self._apart:
                continue
            module = self.model.get_submodule(path)
            own = [n for n in names if n.rpartition(".")[2] in module._parameters]
            buffers = [n for n in names if n not in own and n in self.weights.group_of]
            self.weights.load(buffers)

            def fill(module: Any, _: Any, own: list[str] = own) -> None:
                if any(p is not None and p.is_meta for p in module._parameters.values()):
                    self.weights.load(own)

            if own:
                module.register_forward_pre_hook(fill)


def _block_list(model: Any) -> tuple[str, Any]:
    """The list with the most parameters in the text part, with its path in the model."""
    from torch import nn

    get = getattr(model, "get_decoder", None)
    root = (get() if callable(get) else None) or model
    inside = {id(module) for module in root.modules()}
    lists = [
        (sum(p.numel() for p in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside
    ]
    if not lists:
        raise BlockError(f"{type(model).__name__} has no list of blocks")
    _, path, module = max(lists, key=lambda found: found[0])
    return path, module
