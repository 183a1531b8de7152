"""What is multiplied by which parameter: every matrix product of a forward pass, as it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quant.calibrate.text import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Key = tuple[str, int | None]
"""A parameter by name, and the expert whose matrix is meant where it stacks one for each; -1 stands
for all experts together."""
Add = Callable[[Key, int, "Tensor"], None]
Back = Callable[[Key, "Tensor"], None]


@contextmanager
def watching(
    parameters: Mapping[str, Tensor], add: Add, back: Back | None = None
) -> Iterator[None]:
    """Call ``add(key, axis, x)`` for each product of an ``x`` (..., cols) with a parameter.

    ``axis`` is the axis of the matrix that is summed over. Products are seen where torch is called
    for them, so it does not matter which module a matrix belongs to, or whether it is one of many
    in a stack. ``back(key, gradient)`` is called when the gradient of a product's result
    (..., rows) is found, if it ever is.
    """
    import torch

    functional = torch.nn.functional.linear
    plain = {torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
    plain |= {torch.Tensor.mm, torch.Tensor.bmm}
    owners = {p.untyped_storage().data_ptr(): (name, p) for name, p in parameters.items()}

    def see(x: Tensor, w: Tensor, summed: int, out: Tensor) -> Tensor:
        name, whole = owners.get(w.untyped_storage().data_ptr(), ("", w))
        if not name or whole.ndim < 2 or w.ndim not in (2, whole.ndim):
            return out
        strides = whole.stride()[-2:]
        if w.stride(summed) not in strides:
            return out
        axis = strides.index(w.stride(summed))
        if w.ndim == 2:
            offset = w.storage_offset() - whole.storage_offset()
            key = (name, None if whole.ndim == 2 else offset // whole.stride(0))
            add(key, axis, x)
            return out if back is None else _told(out, lambda gradient: back(key, gradient))
        if x.ndim == 3 and len(x) == len(whole):
            for index, rows in enumerate(x):  # tokens sent elsewhere are rows of zeros
                seen = rows[rows.abs().amax(-1) > 0]
                if len(seen):
                    add((name, index), axis, seen)
            return out if back is None else _told(out, lambda gradient: each(name, gradient))
        return out

    def each(name: str, gradients: Tensor) -> None:
        assert back is not None, "it was asked for"
        for index, gradient in enumerate(gradients):
            back((name, index), gradient)

    def look(function: Any, given: Any, named: Mapping[str, Any], out: Any) -> Any:
        if function is functional:
            return see(given[0], given[1] if len(given) > 1 else named["weight"], -1, out)
        if function in plain and len(given) > 1:
            return see(given[0], given[1], -2, out)
        return see(given[1], given[2], -2, out) if function is torch.addmm else out

    with _watch()(look):
        yield


def _told(out: Any, tell: Callable[[Tensor], None]) -> Any:
    """The result to go on with; ``tell`` is called with the gradient there, once there is one.

    What no input of the block flows into, such as embeddings of n-grams, has none by itself.
    """
    import torch

    if not torch.is_grad_enabled():
        return out
    own = out.requires_grad
    held = out if own else out.requires_grad_()
    held.register_hook(tell)
    return held if own else held.clone()  # which can be changed in place


@cache
def _watch() -> Any:
    """The class of what is told of every call of torch's, made once.

    A class is garbage in a circle: one of each pass would keep the block's weights and moments
    until the collector comes, long after their block.
    """
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __init__(self, look: Callable[[Any, Any, Mapping[str, Any], Any], Any]) -> None:
            super().__init__()
            self._look = look

        def __torch_function__(
            self, function: Any, types: Any, given: Any = (), named: Any = None
        ) -> Any:
            named = named or {}
            return self._look(function, given, named, function(*given, **named))

    return Watch


class Moments:
    """Sums over tokens of x x^T for each matrix; whole, or in blocks along the diagonal.

    Each sequence's product is in float32, their sum in float64, in the order of the sequences.
    """

    def __init__(self, *, width: int | None, wanted: frozenset[Key] | None = None) -> None:
        """Blocks of ``width`` columns, or whole matrices; of the matrices ``wanted`` (all)."""
        self._width = width
        self._wanted = wanted
        self._sums: dict[Key, Tensor] = {}
        self._same: dict[Key, Key] = {}
        self._recent: list[tuple[Tensor, Key]] = []
        self._divided = False
        self.axes: dict[Key, int] = {}
        """The summed axis of each matrix that was seen."""
        self.columns: dict[Key, int] = {}
        """The length of that axis."""
        self.tokens: dict[Key, int] = {}
        """How many tokens each matrix was multiplied by."""

    def add(self, key: Key, axis: int, x: Tensor) -> None:
        """Count the inputs ``x`` (..., cols) of a matrix."""
        together = (key[0], -1)
        if self._wanted is not None and together in self._wanted and key[1] not in (None, -1):
            self.add(together, axis, x)
        if self._wanted is not None and key not in self._wanted:
            return
        flat = x.reshape(-1, x.shape[-1])
        self.axes[key] = axis
        self.columns[key] = flat.shape[1]
        self.tokens[key] = self.tokens.get(key, 0) + len(flat)
        if key[1] is None:
            for other, leader in self._recent:  # query, key and value share one input
                if other is x and key not in self._sums:
                    self._same[key] = leader
                    return
            self._recent = [*self._recent[-7:], (x, key)]
        assert not self._divided, "means are final"
        found = self._products(flat)
        leader = self._same.get(key, key)
        if leader in self._sums:
            self._sums[leader] += found  # where it lies: wide matrices are of many megabytes
        else:
            self._sums[leader] = found.double()

    def forget(self) -> None:
        """Call between sequences: tensors of one are not compared with those of the next."""
        self._recent = []

    def divide(self) -> None:
        """Make means of the sums where they lie; nothing can be added or pooled any more.

        What ``mean`` gives is then no copy, and must not be changed.
        """
        import torch

        with torch.inference_mode():
            for key, total in self._sums.items():
                total /= max(1, self.tokens[key])
        self._divided = True

    def mean(self, key: Key) -> Array | None:
        """The mean in float64: (cols, cols), or (cols / width, width, width); None if unseen.

        Raises CalibrationError where it is not finite.
        """
        leader = self._same.get(key, key)
        if leader not in self._sums:
            return None
        total = self._sums[leader]
        mean = total if self._divided else total / max(1, self.tokens[leader])
        value: Array = mean.numpy()
        if not np.isfinite(value).all():
            raise CalibrationError(f"{key[0]}: its activations on the calibration text overflow")
        return value

    def pooled(self, name: str) -> Array | None:
        """The mean over the tokens of all experts of a parameter."""
        assert not self._divided, "sums are pooled"
        mine = [key for key in self._sums if key[0] == name]
        if not mine:
            return None
        total = sum(self.tokens[key] for key in mine)
        summed = self._sums[mine[0]].clone()
        for key in mine[1:]:
            summed += self._sums[key]
        value: Array = (summed / max(1, total)).numpy()
        return value

    def _products(self, flat: Tensor) -> Tensor:
        flat = flat.float()
        width = block_width(flat.shape[1], self._width)
        if width is None:
            return flat.T @ flat
        parts = flat.reshape(len(flat), -1, width).permute(1, 2, 0)
        return parts @ parts.transpose(1, 2)


def block_width(columns: int, most: int | None) -> int | None:
    """The widest power of two up to ``most`` that divides the columns; None for whole matrices."""
    if most is None:
        return None
    while columns % most:
        most //= 2
    return most
