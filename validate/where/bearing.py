"""Which rows of what a module takes and gives have a bearing on what a model makes of its inputs.

Patches that only fill a picture up are masked and then left out, embeddings of a picture's tokens
are overwritten, and some towers end in a norm that nobody reads. Two sides may differ there as they
like. The gradient of the reference's outputs tells: such rows have none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.where.trace import Side, kept_rows

Rows = NDArray[np.bool_]
Bearing = Mapping[tuple[str, Side], Rows]
"""By module and side: whether each kept row matters; what is not in it is taken to matter."""


def bearing_of(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    first: Callable[[Any], Any],
    ordered: Callable[[Any, Any], Any],
    call: Callable[[Any, Mapping[str, Any]], Any],
    most: int,
) -> Bearing:
    """Run a float32 torch model forwards and backwards; parameters get no gradients.

    ``first`` picks the traced tensor of a call, ``ordered`` puts a module's values as they are
    traced. Empty where the class computes what has no gradient.
    """
    import torch

    found: dict[tuple[str, Side], tuple[Rows, int] | None] = {}

    def note(path: str, side: Side, module: Any, value: Any) -> None:
        key = (path, side)
        if key in found or not value.requires_grad:
            found[key] = None  # of several calls, or where gradients are switched off
            return
        shape = ordered(module, value).shape
        rows = np.zeros(prod(shape[:-1]), np.bool_)
        found[key] = rows, shape[-1]

        def seen(gradient: Any) -> None:
            flat = ordered(module, gradient).reshape(-1, shape[-1])
            rows[:] |= (flat != 0).any(-1).numpy()

        value.register_hook(seen)

    def before(path: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = first((*given, *named.values()))
            if value is not None:
                note(path, "in", module, value)

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: Any, given: Any, output: Any) -> Any:
            single = isinstance(output, torch.Tensor)
            value = first((output,) if single or not isinstance(output, tuple) else output)
            if value is None:
                return None
            if value.requires_grad or not (single or type(output) is tuple):
                note(path, "out", module, value)
                return None
            # Values that gradients begin with; times one, so that they may be written into.
            begun = value.detach().requires_grad_() * 1.0
            note(path, "out", module, begun)
            return begun if single else tuple(begun if x is value else x for x in output)

        return hook

    hooks = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(path)))
    trained = [value for value in model.parameters() if value.requires_grad]
    for value in trained:
        value.requires_grad_(False)
    try:
        with torch.enable_grad():
            output = call(model, inputs)
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            (output * weights).sum().backward()
    except (RuntimeError, TypeError):  # an operation without a gradient, or on stored results
        return {}
    finally:
        for hook in hooks:
            hook.remove()
        for value in trained:
            value.requires_grad_(True)
    return {key: _kept(*seen, most) for key, seen in found.items() if seen is not None}


def _kept(rows: Rows, width: int, most: int) -> Rows:
    kept = kept_rows((len(rows), width), most)
    return rows if kept is None else rows[kept]
