"""How alike what attention adds up is, which decides how long codes of few bits had best be.

A code of few bits is short on average, and has an error of its own besides. Attention adds the
codes of many tokens up: what they have in common stays, their own errors average out. Coherence is
what the square of such a sum has over the sum of the squares: 1 where few tokens or unlike ones are
attended to, more where many alike are, and the more of them the longer the text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.cache import AVERAGED, BLOCK
from quant.kv.further import Further, run
from quant.kv.spec import SINKS, LayerSpec
from quant.kv.split import Layout

_LONGEST: Final = 2048
"""Tokens that are run at once at most."""
_ASKED: Final = 64
"""Queries of each head that are looked at: the last."""
_SEED: Final = 7
Array = NDArray[np.float32]


def coherences(
    model: Any,
    ids: Sequence[int],
    layouts: Mapping[tuple[int, str], Layout],
    means: Collection[int],
) -> dict[tuple[int, str], float]:
    """Of each tensor of ``layouts``, by (layer, "key" or "value"), at the end of the text ``ids``.

    It is that of one coordinate of its learned basis, on average, and never below 1. ``means``:
    layers whose keys are stored less the mean of the text's first.
    """
    layers = {layer for layer, _ in layouts}
    _, seen = run(model, ids[-_LONGEST:], 0, watched=layers)
    found: dict[tuple[int, str], float] = {}
    for layer in sorted(layers):
        one = _Attention(seen[layer])
        if layer in means:
            one.keys -= one.keys[:, SINKS : SINKS + AVERAGED].mean(axis=1, keepdims=True)
        for role, ratio in (("key", one.of_keys), ("value", one.of_values)):
            basis = layouts[layer, role].basis if (layer, role) in layouts else None
            if basis is not None:
                found[layer, role] = max(1.0, round(ratio(basis.rows), 3))
    return found


class _Attention:
    """What the last queries of a text make of those of its tokens that a cache encodes."""

    def __init__(self, cache: Further) -> None:
        self.keys, self.values = (_tokens(x) for x in cache.taken)
        heads, count, dim = self.keys.shape
        asked = min(_ASKED, count)
        # The queries of a group of heads read the same keys.
        queries = [_tokens(x[:, :, -asked:]).reshape(heads, -1, asked, dim) for x in cache.queries]
        self.queries = np.concatenate(queries, axis=1)
        scores = cache.scale * self.queries @ self.keys[:, None].swapaxes(-1, -2)
        ago = np.arange(count - asked, count)[:, None] - np.arange(count)
        scores = np.where(ago >= 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        self.results = weights @ self.values[:, None]
        encoded = ago >= LayerSpec.window + BLOCK // 2  # what a window holds, on average
        encoded[:, :SINKS] = False
        self.weights = weights * encoded

    def of_values(self, rows: NDArray[np.float16]) -> float:
        """The sum over tokens of weight times coordinate is what reaches the result."""
        basis = rows.astype(np.float32)
        y = ((self.values - basis[:, -1:]) @ np.linalg.inv(basis[:, :-1]))[:, None]
        return _ratio((self.weights @ y) ** 2, self.weights**2 @ y**2)

    def of_keys(self, rows: NDArray[np.float16]) -> float:
        """A score that is s more changes the result by weight times s times (value - result).

        Coordinates are taken with random signs, so that the squares of the sums over them are, on
        average, the sums of their squares (Hutchinson 1990).
        """
        basis = rows[:, :-1].astype(np.float32)
        y = self.keys @ np.linalg.inv(basis)
        along = self.queries @ basis[:, None].swapaxes(-1, -2)
        along *= np.random.default_rng(_SEED).choice([-1.0, 1.0], along.shape)
        moved = self.weights * (along @ y[:, None].swapaxes(-1, -2))
        total = moved @ self.values[:, None] - moved.sum(axis=-1, keepdims=True) * self.results
        far = (
            (self.values**2).sum(axis=-1)[:, None, None]
            - 2 * self.results @ self.values[:, None].swapaxes(-1, -2)
            + (self.results**2).sum(axis=-1, keepdims=True)
        )
        return _ratio(total**2, moved**2 * far)


def _ratio(sums: Array, squares: Array) -> float:
    """Of totals, 1 where nothing was encoded."""
    below = float(squares.sum(dtype=np.float64))
    return float(sums.sum(dtype=np.float64)) / below if below else 1.0


def _tokens(x: Any) -> Array:
    """An array [1, heads, length, dim] without its first axis, in float32."""
    import mlx.core as mx

    return np.array(x[0].astype(mx.float32))
