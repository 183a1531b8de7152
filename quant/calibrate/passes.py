"""One pass of many rows through a streamed model: block after block, all rows abreast."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from quant.calibrate.aside import temporary
from quant.calibrate.bounds import SPILL_BYTES
from quant.calibrate.calls import Call, first, usable
from quant.calibrate.rows import Row, end_here
from quant.errors import CalibrationError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

HIDDEN: Final = ""
"""The name of the hidden states among what a row is taken up with."""


class Streamed(Protocol):
    """What runs the model's blocks, with their weights."""

    model: Any

    def compute(self, index: int, call: Call) -> Any:
        """What block ``index`` answers."""

    def load_rest(self) -> None:
        """Read the weights outside the blocks."""

    def release_rest(self) -> None:
        """Give up the weights outside the blocks."""


class Pass:
    """One pass of rows through the blocks, in order; a context manager that ends their threads.

    On one thread of torch's, sums do not depend on the number of cores.
    """

    def __init__(
        self,
        streamed: Streamed,
        rows: Sequence[Mapping[str, Any]],
        *,
        head: Any,
        threads: int | None,
        gradients: bool,
    ) -> None:
        """Prepare ``rows``; with a ``head``, end them there."""
        self._streamed = streamed
        self._rows = [Row(streamed.model, row, gradients=gradients) for row in rows]
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
        if self._head is not None:  # before its weights are read, which nobody needs then
            ending = self._head.register_forward_pre_hook(end_here, prepend=True)
            self._ending.callback(ending.remove)
        if any(row.seeing for row in self._rows):
            self._streamed.load_rest()
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
        """Whether the pass can be taken up later with what ``states`` gives."""
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
                out = self._streamed.compute(index, row.call_of(index))
                if after is not None:
                    after()
                if keep:
                    row.go_on(self._kept(out))

    def inputs(self, index: int) -> Iterator[Tensor]:
        """The hidden states that every row hands to block ``index``."""
        for row in self._rows:
            yield row.call_of(index).hidden

    def states(self, index: int) -> Iterator[dict[str, Tensor]]:
        """What every row is taken up with at block ``index``: hidden states, and what is shared."""
        for row in self._rows:
            call = row.call_of(index)
            yield {HIDDEN: call.hidden, **call.shared()}

    def call(self, index: int, row: int) -> Call:
        """What ``row`` gives block ``index``, as it is."""
        return self._rows[row].call_of(index)

    def copied(self, index: int, row: int) -> Call:
        """What ``row`` gives block ``index``, in copies that gradients can pass.

        Raises CalibrationError where the block is given more than tensors and containers of them.
        """
        call = self.call(index, row)
        if (what := call.unknown()) is not None:
            raise CalibrationError(
                f"{type(self._streamed.model).__name__} hands its blocks a {what}, so they cannot "
                "run again and again; use --q-method gptq"
            )
        return call.copied()

    def handed(self, row: int) -> Tensor:
        """The hidden states that ``row`` was handed last, a copy."""
        found: Tensor = usable(first(self._rows[row].handed))
        return found

    def answer(self, index: int, answers: Iterable[Any]) -> None:
        """Hand every row what was computed elsewhere for its call of block ``index``."""
        for row, found in zip(self._rows, answers, strict=True):
            row.call_of(index)
            row.go_on(found)

    def resume(self, index: int, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take a ``plain`` pass up at block ``index``, with what ``states`` gave there before."""
        for row, state in zip(self._rows, states, strict=True):
            for at in range(index):
                row.go_on(row.call_of(at).hidden)
            shared = {name: tensor for name, tensor in state.items() if name != HIDDEN}
            row.replace(index, state[HIDDEN], shared)

    def results(self) -> Iterator[Any]:
        """What each row ends with, after the last block; each is there once."""
        for row in self._rows:
            yield row.finish()

    def _kept(self, out: Any) -> Any:
        hidden = first(out)
        if self._spill is None and hidden.nbytes * len(self._rows) > SPILL_BYTES:
            self._spill = _Spill(self._ending.enter_context(temporary("hidden")))
        if self._spill is None:
            return out
        hidden = self._spill.keep(hidden)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


class _Spill:
    """A folder for hidden states that memory has no room for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def keep(self, value: Tensor) -> Tensor:
        """A copy of ``value`` whose bytes the system can write back to disk."""
        import torch

        path = self._folder / str(self._count)
        self._count += 1
        _reserve(path, value.nbytes)
        held = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype)
        path.unlink()  # the mapping keeps it until the tensor goes
        return held.view(value.shape).copy_(value)


def _reserve(path: Path, size: int) -> None:
    """Make the file whole: a full disk is an error now, and would kill the process later."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
