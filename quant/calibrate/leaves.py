"""Parameters that gradients are asked of, experts of a stack each for themselves.

A stack's experts are used one at a time, and torch's gradient of one is as large as the stack. So
while gradients are asked for, indexing a stack gives tensors of their own, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from quant.calibrate.loading import Weights
from quant.calibrate.slots import Leaf

if TYPE_CHECKING:
    from torch import Tensor


class Leaves:
    """The parameters of a loaded block, by name and expert."""

    def __init__(self, weights: Weights, parameters: Sequence[str]) -> None:
        """``parameters`` are the names of those of the block."""
        self._weights = weights
        self._tensors = {name: weights.value(name) for name in parameters}

    def __getitem__(self, leaf: Leaf) -> Tensor:
        """The values of a leaf, in the parameter's own memory."""
        name, expert = leaf
        found: Tensor = self._tensors[name].detach()
        return found if expert is None else found[expert]

    @contextmanager
    def differentiable(self, leaves: Sequence[Leaf]) -> Iterator[None]:
        """Let gradients of some leaves be asked for; the others have none meanwhile."""
        import torch

        self._asked: dict[Leaf, Any] = {}
        self._whole: dict[str, Any] = {}
        try:
            for name in sorted({name for name, _ in leaves}):
                mine = {e: self[name, e].requires_grad_() for n, e in leaves if n == name}
                if None in mine:
                    held = torch.nn.Parameter(self[name, None])
                else:
                    held = _stack()(self[name, None], mine)
                    self._asked |= {(name, e): leaf for e, leaf in mine.items()}
                self._whole[name] = held
                self._weights.put(name, held)
            yield
        finally:
            for name in self._whole:
                self._weights.put(name, self._tensors[name])
            self._asked, self._whole = {}, {}

    def gradients(self, loss: Any, leaves: Sequence[Leaf]) -> dict[Leaf, Tensor]:
        """Those of the loss, for leaves that it depends on."""
        import torch

        wanted = [*self._asked.values(), *self._whole.values()]
        given = torch.autograd.grad(loss, wanted, allow_unused=True)
        parts = dict(zip(self._asked, given[: len(self._asked)], strict=True))
        whole = dict(zip(self._whole, given[len(self._asked) :], strict=True))
        found = {}
        for name, expert in leaves:
            one, all_ = parts.get((name, expert)), whole[name]
            if all_ is not None and expert is not None:
                all_ = all_[expert]
            each = [gradient for gradient in (one, all_) if gradient is not None]
            if each:
                found[name, expert] = sum(each[1:], start=each[0])
        return found


@cache
def _stack() -> Any:
    """The class of a parameter whose experts are leaves, made once."""
    import torch

    class Stack(torch.nn.Parameter):
        experts: dict[Any, Any]

        def __new__(cls, values: Any, experts: dict[Any, Any]) -> Any:
            found = super().__new__(cls, values, requires_grad=True)
            found.experts = experts
            return found

        def __getitem__(self, index: Any) -> Any:
            if not _number(index):
                return super().__getitem__(index)
            number = int(index)  # a gradient of any other expert would be as large as all
            return self.experts[number] if number in self.experts else self.detach()[number]

    return Stack


def _number(index: Any) -> bool:
    import torch

    return isinstance(index, int) or (
        isinstance(index, torch.Tensor) and index.ndim == 0 and not index.is_floating_point()
    )
