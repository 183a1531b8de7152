"""Tables that are read by rows and never whole, in the place of an embedding's weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quant.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[int, int], "Tensor"]
"""Rows ``[start, stop)`` of a table, in float32."""


def look_up(module: Any, read: Read) -> None:
    """Let an embedding read the rows that it is asked for, each time anew."""
    shape = tuple(module.weight.shape)
    del module._parameters["weight"]
    vars(module)["weight"] = Rows(read, shape)


class Rows:
    """A table that stands for a tensor where torch looks up in it, or a model takes rows of it."""

    def __init__(self, read: Read, shape: tuple[int, ...]) -> None:
        """``read`` gives the rows of a table of this ``shape``."""
        import torch

        self._read = read
        self.shape = torch.Size(shape)
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def __getitem__(self, index: Any) -> Tensor:
        """Rows by number, slice or a list of numbers, and parts of them by further indices."""
        import torch

        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int):
            rows = self._read(first, first + 1)[0]
            return rows[tuple(rest)] if rest else rows
        if isinstance(first, slice):
            start, stop, step = first.indices(self.shape[0])
            return self._read(start, max(start, stop))[(slice(None, None, step), *rest)]
        if first.ndim != 1 or first.dtype == torch.bool or not len(first):
            raise _refusal()
        rows = torch.cat([self._read(token, token + 1) for token in first.tolist()])
        return rows[(slice(None), *rest)]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, given: Any = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """The look-up, whichever module does it; what else torch is to do with a table, it cannot.

        The numbers in use may be asked for by several threads, so nothing is kept.
        """
        import torch

        if function is not torch.nn.functional.embedding:
            raise _refusal()
        numbers, table = given
        used, places = torch.unique(numbers, return_inverse=True)
        return torch.nn.functional.embedding(places, table[used])


def _refusal() -> CalibrationError:
    from quant.calibrate.rows import BlockError

    return BlockError("it takes rows of an embedding in a way that cannot be read apart")
