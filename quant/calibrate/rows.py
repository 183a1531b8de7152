"""One sequence's forward pass, in a thread that stops wherever the model calls a block."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quant.calibrate.calls import Call
from quant.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor


class BlockError(CalibrationError):
    """A model cannot be run block by block; ``reason`` says why, the message what to do."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}, so it cannot be calibrated so; use --q-method search")


class _Stop(BaseException):
    """Not an error: the forward pass has shown enough."""


class Row(threading.Thread):
    """One sequence's forward pass; it and the main thread take turns."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, gradients: bool) -> None:
        """Prepare ``model(**inputs)``; with ``gradients`` they pass what is around the blocks."""
        super().__init__(daemon=True)
        self._model = model
        self._inputs = inputs
        self._gradients = gradients
        self._mine = threading.Semaphore(0)
        self._theirs = threading.Semaphore(0)
        self._called: tuple[int, Call] | None = None
        self._answer: Any = None
        self._over = self._stopped = self._answered = False
        self._error: BaseException | None = None
        self.result: Any = None
        self.plain = True
        """Whether blocks were handed only what a pass can be taken up with."""
        self.seeing = any(name.startswith(("pixel", "image", "video")) for name in inputs)
        """Whether there are pictures in the sequence."""

    def run(self) -> None:
        """The model's forward pass."""
        import torch

        self._mine.acquire()
        try:
            if not self._stopped:
                with torch.inference_mode(not self._gradients):
                    self.result = self._model(**{"use_cache": False, **self._inputs})
        except _Stop:
            pass
        except BaseException as error:  # raised again in the main thread
            self._error = error
        self._over = True
        self._theirs.release()

    def block(self, index: int, call: Call) -> Any:
        """Called by a block in the row's own thread: wait for what the block computes."""
        self._called = (index, call)
        self.plain = self.plain and call.unknown() is None
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

    def call_of(self, index: int) -> Call:
        """What block ``index`` is given; BlockError where it is not its turn."""
        if self._answered:
            self.advance()
        if self._over or self._called is None or self._called[0] != index:
            raise BlockError(
                f"{type(self._model).__name__} does not call its blocks one after another"
            )
        return self._called[1]

    def go_on(self, answer: Any) -> None:
        """Hand the row the result of the block that it waits for."""
        self._answer, self._called, self._answered = answer, None, True

    def replace(self, index: int, hidden: Tensor, shared: Mapping[str, Tensor]) -> None:
        """Change the hidden states that block ``index`` is given, and fill its containers."""
        call = self.call_of(index)
        call.share(shared)
        self._called = (index, call.with_hidden(hidden))

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


def stand_in(index: int) -> Any:
    """A forward function for block ``index`` that waits for the block's answer in its place."""

    def forward(*positional: Any, **named: Any) -> Any:
        return _own_row().block(index, Call(positional, named))

    return forward


def end_here(module: Any, given: tuple[Any, ...]) -> None:
    """A forward hook that ends the row; its result is what ``module`` was given."""
    _own_row().result = given[0]
    raise _Stop


def _own_row() -> Row:
    row = threading.current_thread()
    assert isinstance(row, Row), "the model runs inside a pass only"
    return row
