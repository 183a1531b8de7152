"""Vocabulary tables of the reference, which are read by rows and never whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quant.calibrate.bounds import TABLE_BYTES
from quant.calibrate.lookups import Read, look_up
from quant.calibrate.stream import StreamedModel
from validate.streamed.bounds import SLICE_BYTES

if TYPE_CHECKING:
    from torch import Tensor


def tables(model: Any) -> dict[str, Any]:
    """The large embeddings of a transformers model, and its output projection, by path."""
    from torch import nn

    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Embedding) or (module is head and type(head) is nn.Linear))
        and module.weight.numel() * 4 > TABLE_BYTES
    }


@dataclass(frozen=True, kw_only=True)
class Head:
    """An output projection that is never whole."""

    module: Any
    rows: Read
    bias: Callable[[], Tensor] | None

    def project(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The projections of ``states`` (..., size), a slice of the vocabulary after the other."""
        import torch

        words, width = self.module.out_features, self.module.in_features
        step = max(1, SLICE_BYTES // (4 * width))
        bias = self.bias() if self.bias is not None else None
        found = [torch.empty(*state.shape[:-1], words) for state in states]
        with torch.inference_mode():
            for start in range(0, words, step):
                stop = min(words, start + step)
                weight = self.rows(start, stop)
                part = None if bias is None else bias[start:stop]
                for state, out in zip(states, found, strict=True):
                    out[..., start:stop] = torch.nn.functional.linear(state, weight, part)
        return found


def by_rows(streamed: StreamedModel, found: Mapping[str, Any]) -> Head | None:
    """Let the embeddings among ``found`` read the rows that they are asked for.

    Returns the output projection, which is then the block after the last; None where it is loaded
    whole.
    """
    from torch import nn

    head = None
    for path, module in found.items():
        read = streamed.weights.rows_of(f"{path}.weight")
        if read is None:
            _whole(streamed, path, module)
        elif isinstance(module, nn.Embedding):
            look_up(module, read)
        else:
            whole = streamed.weights.rows_of(f"{path}.bias") if module.bias is not None else None
            bias = None if whole is None else partial(whole, 0, len(module.bias))
            head = Head(module=module, rows=read, bias=bias)
            streamed.stop_at(module)
    return head


def _whole(streamed: StreamedModel, path: str, module: Any) -> None:
    names = [f"{path}.{name}" for name, _ in module.named_parameters()]

    def fill(module: Any, given: Any) -> None:
        if module.weight.is_meta:
            streamed.weights.load(names)

    module.register_forward_pre_hook(fill)
