"""How keys and values are spread over their directions, wherever in a text they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.cache import AVERAGED
from quant.kv.further import run, slopes
from quant.kv.scan import LayerFacts

_SAME: Final = 1e-3
"""Mean KL, in nats, up to which positions further on change nothing."""
_PLACES: Final = 8
_SHARES: Final = (1.0, 0.5, 0.25, 0.125)
"""Of a context, what is tried in turn: far on, rotary embeddings lose precision."""
_STRETCH: Final = 512
"""Tokens that are run at once at most."""


@dataclass
class Spread:
    """Of the keys or the values of a layer's heads."""

    total: Any
    """Their sum [heads, dim]."""
    outer: Any
    """The sum of their outer products [heads, dim, dim]."""
    count: int
    cost: Any = 0.0
    """The sum of what their errors cost [heads, dim, dim], in proportion to their squares."""

    def add(self, other: Spread) -> Spread:
        """Of both."""
        return Spread(
            self.total + other.total,
            self.outer + other.outer,
            self.count + other.count,
            self.cost + other.cost,
        )

    def mean(self) -> NDArray[np.float64]:
        """[heads, dim]"""
        return np.asarray(self.total / self.count)

    def about(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean outer product [heads, dim, dim] of what is left of them without their ``mean``."""
        return np.asarray(self.outer / self.count - mean[:, :, None] * mean[:, None])

    def price(self) -> NDArray[np.float64] | None:
        """What errors cost [heads, dim, dim], in proportion; None where it is not known."""
        return np.asarray(self.cost / self.count) if np.any(self.cost) else None


def spreads(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    means: Collection[int],
    skip: int,
    context: int,
) -> dict[tuple[int, str], Spread]:
    """By (layer, "key" or "value") over the tokens ``ids``.

    Rotary embeddings turn keys as a text goes on, so that those of its beginning would show
    directions as empty that later ones fill. So stretches of the text are run at places up to
    ``context`` into one, which changes no prediction. Where it does even up to an eighth of the
    context, the runtime does not take it, or the context is unknown (0), all are run as beginnings,
    which tell nothing of keys further on: then there are no keys in the answer. The first ``skip``
    tokens of each are left out, and keys of the layers of ``means`` are taken less the mean of the
    text's first, wherever they are: a cache takes off the mean of its first tokens for good, which
    rotary embeddings turn further on.
    """
    layers = [fact.index for fact in facts if fact.quantizable]
    many = len(ids) // -(-len(ids) // _STRETCH)
    parts = [ids[at : at + many] for at in range(0, len(ids) - many + 1, many)]
    places = _places(model, parts[0], context)
    whereabouts = places or [0]
    found: dict[tuple[int, str], Spread] = {}
    first: dict[int, Any] = {}
    priced = True
    for number in range(max(_PLACES, len(parts))):
        part, place = parts[number % len(parts)], whereabouts[number % len(whereabouts)]
        rows, seen = run(model, part, place, watched=layers)
        slope = slopes(model, part, place, rows, seen) if priced else None
        priced = slope is not None
        for index, cache in seen.items():
            keys, values = (_tokens(x)[:, skip:] for x in cache.taken)
            if index in means:
                begun = keys[:, :AVERAGED].mean(axis=1, keepdims=True)
                keys -= first.setdefault(index, begun)  # the first run is at place 0
            costs = _costs(cache.queries, slope[index], len(keys)) if slope else {}
            for role, x in (("key", keys), ("value", values)):
                if role == "key" and not places:
                    continue
                one = Spread(x.sum(axis=1), _outer(x), x.shape[1], costs.get(role, 0.0))
                known = found.get((index, role))
                found[index, role] = known.add(one) if known else one
    return found


def _costs(queries: Sequence[Any], slope: Sequence[Any], heads: int) -> dict[str, Any]:
    """What errors of keys and of values cost [heads, dim, dim], in proportion.

    Errors of many tokens are independent of each other. Those of values reach a result of attention
    as they are: they cost what the result costs. One of a key reaches it through its product with
    the query, so that what counts is how queries lie, each as much as its result costs.
    """
    key: Any = 0.0
    value: Any = 0.0
    for query, along in zip(queries, slope, strict=True):
        q, g = _tokens(query), _tokens(along)
        q = q * np.linalg.norm(g, axis=-1, keepdims=True)
        # The queries of a group of heads read the same keys.
        key = key + _outer(q.reshape(heads, -1, q.shape[-1]))
        value = value + _outer(g.reshape(heads, -1, g.shape[-1]))
    return {"key": key, "value": value}


def _places(model: Any, ids: Sequence[int], context: int) -> list[int]:
    """Places of a context, or of a share of it, from which on ``ids`` have the same predictions.

    The first is 0. None where it is the only one, but in a context no longer than ``ids``.
    """
    last = max(0, context - len(ids))
    if not last:
        return [0] if context else []
    import mlx.core as mx

    exact = run(model, ids, 0)[0]
    for share in _SHARES:
        reach = int(last * share)
        places = [reach * number // (_PLACES - 1) for number in range(_PLACES)]
        try:
            for place in reversed(places[1:]):
                rows = run(model, ids, place)[0]
                if float((mx.exp(exact) * (exact - rows)).sum(axis=-1).mean()) >= _SAME:
                    break
            else:
                return places
        except (ValueError, TypeError, AttributeError, IndexError):
            return []  # a runtime that keeps positions of its own, from the call before
    return []


def _tokens(x: Any) -> NDArray[np.float64]:
    """An array [1, heads, length, dim] without its first axis, in float64."""
    import mlx.core as mx

    return np.array(x[0].astype(mx.float32)).astype(np.float64)


def _outer(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of outer products [heads, dim, dim] of [heads, length, dim]."""
    return x.swapaxes(-1, -2) @ x
