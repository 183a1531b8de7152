"""A transformers model run block by block: one block's weights at a time, all sequences abreast.

Every sequence runs the model's own forward pass, in a thread that stops where a block is called.
Block by block the weights are read, the block computes for each sequence in turn, and its weights
are given up. Whatever the model does before, between and after its blocks is its own code, so the
numbers are those of the whole model.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from arch_maps.ops import RowReader
from quant.calibrate.loading import Shapes, Weights, empty_model
from quant.calibrate.text import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

SPILL_BYTES: Final = 1 << 30
"""Hidden states beyond this many bytes are kept in a file."""


class _Stop(BaseException):
    """Not an error: the forward pass has shown enough."""


class BlockError(CalibrationError):
    """A model cannot be run block by block; ``reason`` says why, the message what to do."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}, so it cannot be calibrated so; use --q-method search")


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
        ``apart``, outside the blocks, get theirs from whoever names them. Raises CalibrationError
        where transformers cannot build it, BlockError where it has no list of blocks.
        """
        if model is None:
            model = empty_model(folder, trust_remote_code=trust_remote_code)
        self.model = model
        self._apart = apart
        self.path, self.blocks = _block_list(self.model)
        self.weights = Weights(self.model, reader, shapes)
        self._names = [
            [n for n in self.weights.names if n.startswith(f"{self.path}.{index}.")]
            for index in range(len(self.blocks))
        ]
        self._inside = {n for names in self._names for n in names}
        self._forwards = [block.forward for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = _stand_in(index)
        self._load_on_demand()

    def parameters(self, index: int) -> list[str]:
        """Names of the parameters of block ``index``."""
        return self._names[index]

    @contextmanager
    def loaded(self, index: int) -> Iterator[Any]:
        """Block ``index`` with its weights, which are gone afterwards."""
        self.weights.load(self._names[index])
        try:
            yield self.blocks[index]
        finally:
            self.weights.release(self._names[index])

    def compute(self, index: int, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """What block ``index`` answers; its weights must be loaded."""
        return self._forwards[index](*positional, **named)

    def run(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        until_head: bool = False,
        threads: int | None = 1,
    ) -> Pass:
        """Begin a pass over ``rows``, each the keyword arguments of one forward call.

        ``until_head`` ends every row where the output projection is called; the result is then
        what that projection was given. torch computes on ``threads``, None for as many as before.
        """
        return Pass(self, rows, self.head if until_head else None, threads)

    def stop_at(self, module: Any) -> int:
        """Make a module that is called after all blocks one more block; its index."""
        index = len(self.blocks)
        module.forward = _stand_in(index)
        return index

    @property
    def head(self) -> Any:
        """The output projection, or None."""
        return self.model.get_output_embeddings()

    def release_rest(self) -> None:
        """Give up the weights outside the blocks; they come back when they are needed."""
        self.weights.release([n for n in self.weights.names if n not in self._inside])

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


class Pass:
    """One pass of rows through the blocks, in order; a context manager that ends their threads.

    On one thread of torch's, sums do not depend on the number of cores.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        rows: Sequence[Mapping[str, Any]],
        head: Any,
        threads: int | None,
    ) -> None:
        """Prepare ``rows``; with a ``head``, end them there."""
        self._streamed = streamed
        self._rows = [_Row(streamed.model, row) for row in rows]
        self._head = head
        self._threads = threads
        self._ending = ExitStack()
        self._spill: _Spill | None = None

    def __enter__(self) -> Self:
        """Run every row up to its first block."""
        import torch

        self._ending.callback(torch.set_num_threads, torch.get_num_threads())
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        if self._head is not None:
            self._ending.callback(self._head.register_forward_pre_hook(_end_here).remove)
        try:
            for row in self._rows:
                self._ending.callback(row.end)
                row.start()
                row.advance()
        except BaseException:
            self._ending.close()
            raise
        self._streamed.release_rest()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.close()

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    @property
    def plain(self) -> bool:
        """Whether blocks are handed, besides hidden states, nothing that they could change."""
        return all(row.plain for row in self._rows)

    def forward(
        self,
        index: int,
        *,
        keep: bool,
        rows: int | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Put the first ``rows`` (all) through block ``index``, which is loaded.

        ``keep`` hands the results on; ``after`` is called after each row. Raises BlockError
        where the model does not call its blocks one after another.
        """
        import torch

        with torch.inference_mode():
            for row in self._rows[:rows]:
                positional, named = row.call_of(index)
                out = self._streamed.compute(index, positional, named)
                if after is not None:
                    after()
                if keep:
                    row.go_on(self._kept(out))

    def inputs(self, index: int) -> Iterator[Tensor]:
        """The hidden states that every row hands to block ``index``."""
        for row in self._rows:
            yield _hidden(*row.call_of(index))

    def call(self, index: int, row: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``row`` gives block ``index``, in copies that gradients can pass.

        Raises CalibrationError where the block is given more than tensors and containers of them.
        """
        positional, named = self._rows[row].call_of(index)
        if (what := _uncopied((positional, named))) is not None:
            raise CalibrationError(
                f"{type(self._streamed.model).__name__} hands its blocks a {what}, so they cannot "
                "run again and again; use --q-method gptq"
            )
        return usable(positional), usable(named)

    def handed(self, row: int) -> Tensor:
        """The hidden states that ``row`` was handed last, a copy."""
        found: Tensor = usable(_first(self._rows[row].handed))
        return found

    def answer(self, index: int, answers: Iterable[Any]) -> None:
        """Hand every row what was computed elsewhere for its call of block ``index``."""
        for row, found in zip(self._rows, answers, strict=True):
            row.call_of(index)
            row.go_on(found)

    def resume(self, index: int, hidden: Sequence[Tensor]) -> None:
        """Take a ``plain`` pass up at block ``index``, with what ``inputs`` gave there before."""
        for row, state in zip(self._rows, hidden, strict=True):
            for at in range(index):
                row.go_on(_hidden(*row.call_of(at)))
            row.replace(index, state)

    def results(self) -> Iterator[Any]:
        """What each row ends with, after the last block; each is there once."""
        for row in self._rows:
            yield row.finish()

    def _kept(self, out: Any) -> Any:
        first = _first(out)
        if self._spill is None and first.nbytes * len(self._rows) > SPILL_BYTES:
            self._spill = self._ending.enter_context(_Spill())
        if self._spill is None:
            return out
        first = self._spill.keep(first)
        return (first, *out[1:]) if isinstance(out, tuple) else first


class _Row(threading.Thread):
    """One sequence's forward pass; it and the main thread take turns."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self._model = model
        self._inputs = inputs
        self._mine = threading.Semaphore(0)
        self._theirs = threading.Semaphore(0)
        self._call: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self._answer: Any = None
        self._over = self._stopped = self._answered = False
        self._error: BaseException | None = None
        self.result: Any = None
        self.plain = True

    def run(self) -> None:
        """The model's forward pass."""
        import torch

        self._mine.acquire()
        try:
            if not self._stopped:
                with torch.inference_mode():
                    self.result = self._model(**{"use_cache": False, **self._inputs})
        except _Stop:
            pass
        except BaseException as error:  # raised again in the main thread
            self._error = error
        self._over = True
        self._theirs.release()

    def block(self, index: int, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Called by a block in the row's own thread: wait for what the block computes."""
        self._call = (index, positional, named)
        others = [v for k, v in named.items() if k != "hidden_states"] + list(positional[1:])
        self.plain = self.plain and all(map(_unchanging, others))
        self._theirs.release()
        self._mine.acquire()
        if self._stopped:
            raise _Stop
        answer, self._answer = self._answer, None
        return answer

    def advance(self) -> None:
        """Let the row run to its next block or its end."""
        self._answered = False
        self._mine.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    @property
    def handed(self) -> Any:
        """The result that the row goes on with when it is next asked."""
        assert self._answered, "the row was handed nothing yet"
        return self._answer

    def call_of(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block ``index`` is given."""
        if self._answered:
            self.advance()
        if self._over or self._call is None or self._call[0] != index:
            raise BlockError(
                f"{type(self._model).__name__} does not call its blocks one after another"
            )
        return self._call[1], self._call[2]

    def go_on(self, answer: Any) -> None:
        """Hand the row the result of the block that it waits for."""
        self._answer, self._call, self._answered = answer, None, True

    def replace(self, index: int, hidden: Tensor) -> None:
        """Change the hidden states that block ``index`` is given."""
        positional, named = self.call_of(index)
        if positional:
            self._call = (index, (hidden, *positional[1:]), named)
        else:
            self._call = (index, positional, {**named, "hidden_states": hidden})

    def finish(self) -> Any:
        """Run to the end and give the result away."""
        if self._answered:
            self.advance()
        result, self.result = self.result, None
        return result

    def end(self) -> None:
        """Stop the thread wherever it is."""
        if self.is_alive() and not self._over:
            self._stopped = True
            self._mine.release()
            self.join()


class _Spill:
    """A folder for hidden states that memory has no room for."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hidden-")
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def keep(self, value: Tensor) -> Tensor:
        """A copy of ``value`` whose bytes the system can write back to disk."""
        import torch

        path = Path(self._folder.name) / str(self._count)
        self._count += 1
        held = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        path.unlink()  # the mapping keeps it until the tensor goes
        return held.view(value.shape).copy_(value)


def _stand_in(index: int) -> Any:
    def forward(*positional: Any, **named: Any) -> Any:
        row = threading.current_thread()
        assert isinstance(row, _Row), "blocks run inside a pass only"
        return row.block(index, positional, named)

    return forward


def _end_here(module: Any, given: tuple[Any, ...]) -> None:
    row = threading.current_thread()
    assert isinstance(row, _Row), "the head runs inside a pass only"
    row.result = given[0]
    raise _Stop


def usable(value: Any) -> Any:
    """A copy of tensors, at any depth, that gradients can pass: inference mode's own cannot."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(usable(item) for item in value)
    if type(value) is dict:
        return {key: usable(item) for key, item in value.items()}
    return value


def _uncopied(value: Any) -> str | None:
    """The type of what ``usable`` would share, None where it copies all that can change."""
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (tuple, list):
        return next((found for item in value if (found := _uncopied(item))), None)
    return None if _unchanging(value) else type(value).__name__


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _hidden(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    return positional[0] if positional else named["hidden_states"]


def _unchanging(value: Any) -> bool:
    import torch

    if isinstance(value, tuple | list):
        return all(map(_unchanging, value))
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)


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
