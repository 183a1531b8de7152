"""How keys and values are spread over their directions, wherever in a text they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.cache import AVERAGED
from quant.kv.measure import forward_of
from quant.kv.runtime import own_caches
from quant.kv.scan import LayerFacts

_SAME: Final = 1e-3
"""Mean KL, in nats, up to which positions further on change nothing."""
_PLACES: Final = 8
_STRETCH: Final = 512


class _Further:
    """A runtime's empty cache that says it is further on in a text, and keeps what it is given."""

    def __init__(self, cache: Any, place: int) -> None:
        vars(self).update(cache=cache, place=place, taken=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["cache"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["cache"], name, value)

    @property
    def offset(self) -> Any:
        return self.cache.offset + self.place

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        vars(self)["taken"] = (keys, values)
        return self.cache.update_and_fetch(keys, values)


@dataclass
class Spread:
    """Of the keys or the values of a layer's heads."""

    total: Any
    """Their sum [heads, dim]."""
    outer: Any
    """The sum of their outer products [heads, dim, dim]."""
    count: int

    def add(self, other: Spread) -> Spread:
        """Of both."""
        return Spread(self.total + other.total, self.outer + other.outer, self.count + other.count)

    def mean(self) -> NDArray[np.float64]:
        """[heads, dim]"""
        return np.asarray(self.total / self.count)

    def about(self, mean: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean outer product [heads, dim, dim] of what is left of them without their ``mean``."""
        return np.asarray(self.outer / self.count - mean[:, :, None] * mean[:, None])


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
    ``context`` into one, which changes no prediction. Where it does, the runtime does not take it,
    or the context is unknown (0), all are run as beginnings, which tell nothing of keys further on:
    then there are no keys in the answer. The first ``skip`` tokens of each are left out, and keys
    of the layers of ``means`` are taken less the mean of the text's first, wherever they are: a
    cache takes off the mean of its first tokens for good, which rotary embeddings turn further on.
    """
    import mlx.core as mx

    many = min(_STRETCH, len(ids))
    parts = [ids[at : at + many] for at in range(0, len(ids) - many + 1, many)]
    last = max(0, context - many)
    everywhere = context > 0 and (not last or _is_same(model, parts[0], last))
    if not everywhere:
        last = 0
    found: dict[tuple[int, str], Spread] = {}
    first: dict[int, Any] = {}
    for number in range(max(_PLACES, len(parts))):
        place = last * (number % _PLACES) // (_PLACES - 1)
        taken = _run(model, parts[number % len(parts)], place)[1]
        for fact in facts:
            if not fact.quantizable:
                continue
            for role, x in zip(("key", "value"), taken[fact.index], strict=True):
                if role == "key" and not everywhere:
                    continue
                plain = np.array(x[0, :, skip:].astype(mx.float32)).astype(np.float64)
                if role == "key" and fact.index in means:
                    begun = plain[:, :AVERAGED].mean(axis=1, keepdims=True)
                    plain -= first.setdefault(fact.index, begun)  # the first run is at place 0
                one = Spread(plain.sum(axis=1), plain.swapaxes(-1, -2) @ plain, plain.shape[1])
                known = found.get((fact.index, role))
                found[fact.index, role] = known.add(one) if known else one
    return found


def _is_same(model: Any, ids: Sequence[int], place: int) -> bool:
    """Whether a text has the same predictions further on: positions are relative then."""
    import mlx.core as mx

    exact = _run(model, ids, 0)[0]
    try:
        rows = _run(model, ids, place)[0]
        loss = float((mx.exp(exact) * (exact - rows)).sum(axis=-1).mean())
    except (ValueError, TypeError, AttributeError, IndexError):
        return False  # a runtime that keeps positions of its own, from the call before
    return loss < _SAME


def _run(model: Any, ids: Sequence[int], place: int) -> tuple[Any, list[Any]]:
    """Log-probabilities [length, vocabulary], and by layer the keys and values that came."""
    import mlx.core as mx

    caches = [
        _Further(cache, place) if hasattr(cache, "update_and_fetch") else cache
        for cache in own_caches(model)
    ]
    rows = forward_of(model)(mx.array([list(ids)]), caches)[0].astype(mx.float32)
    rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    return rows, [vars(cache).get("taken") for cache in caches]
