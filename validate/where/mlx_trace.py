"""Tracing a loaded MLX model: its modules note what they are given and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from validate.where.trace import MOST, Trace, kept_rows


@contextmanager
def trace_mlx(model: Any, paths: Iterable[str], *, most: int = MOST) -> Iterator[Trace]:
    """Note the calls of the modules at ``paths`` while the context is open.

    Python looks ``__call__`` up on the class, so each module gets a class of its own meanwhile,
    called as before and below the one it had.
    """
    trace = Trace(most)
    wanted = set(paths)
    undo: list[tuple[Any, type]] = []
    try:
        for path, module in model.named_modules():
            if path in wanted:
                undo.append((module, type(module)))
                module.__class__ = _watched(type(module), path, trace)
        yield trace
    finally:
        for module, own in reversed(undo):
            module.__class__ = own


def _watched(own: type, path: str, trace: Trace) -> type:
    import mlx.core as mx

    call: Callable[..., Any] = own.__call__

    def watching(self: Any, *given: Any, **named: Any) -> Any:
        value = _first((*given, *named.values()), mx)
        if value is not None:
            trace.add(path, "in", *_kept(value, trace.most, mx))
        output = call(self, *given, **named)
        value = _first(output if isinstance(output, tuple | list) else (output,), mx)
        if value is not None:
            trace.add(path, "out", *_kept(value, trace.most, mx))
        return output

    return type(own.__name__, (own,), {"__call__": watching, "__module__": own.__module__})


def _first(values: Any, mx: Any) -> Any:
    """The first array of floats."""
    floats = (mx.float32, mx.float16, mx.bfloat16)
    for value in values:
        if isinstance(value, mx.array) and value.dtype in floats:
            return value
    return None


def _kept(value: Any, most: int, mx: Any) -> tuple[Any, tuple[int, ...]]:
    """The values to keep of a call, computed at once, and the shape of all of them.

    Of an array that exists only inside a compiled function there are none.
    """
    shape = tuple(value.shape)
    rows = kept_rows(shape, most)
    try:
        if rows is not None:
            value = value.reshape(-1, shape[-1])[mx.array(rows)]
        return np.array(value.astype(mx.float32)), shape
    except (ValueError, RuntimeError):
        return np.float32(np.nan), ()
