"""Models whose parameters hold nothing: what a runtime's constructor would draw is not a number.

Each draw of MLX builds on the random state of the one before. Thousands of draws that nobody ever
computes would leave a chain as long, which nothing should have to walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch


@contextmanager
def unfilled() -> Iterator[None]:
    """Let drawn arrays be NaN of their shape while models are built."""
    mx: Any = import_module("mlx.core")

    def uniform(
        low: Any = 0, high: Any = 1, shape: Any = (), dtype: Any = mx.float32, **_: Any
    ) -> Any:
        return mx.full(shape, math.nan, dtype)

    def normal(shape: Any = (), dtype: Any = mx.float32, *_: Any, **__: Any) -> Any:
        return mx.full(shape, math.nan, dtype)

    with patch.object(mx.random, "uniform", uniform), patch.object(mx.random, "normal", normal):
        yield
