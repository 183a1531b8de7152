"""How keys and values are spread over their directions, wherever in a text they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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


def spreads(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    means: Collection[int],
    skip: int,
    context: int,
) -> dict[tuple[int, str], NDArray[np.float64]]:
    """Mean outer products [heads, dim, dim] by (layer, "key" or "value") over the tokens ``ids``.

    Rotary embeddings turn keys as a text goes on, so that those of its beginning would show
    directions as empty that later ones fill. So the same tokens are run at places up to
    ``context`` into a text as well, which changes no prediction; where it does, positions are not
    relative, and the beginning is all there is. The first ``skip`` tokens are left out, and keys
    of the layers of ``means`` are taken less their mean.
    """
    import mlx.core as mx

    found: dict[tuple[int, str], NDArray[np.float64]] = {}
    exact: Any = None
    for place in _places(len(ids), context):
        caches = [
            _Further(cache, place) if hasattr(cache, "update_and_fetch") else cache
            for cache in own_caches(model)
        ]
        rows = forward_of(model)(mx.array([list(ids)]), caches)[0].astype(mx.float32)
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        exact = rows if exact is None else exact
        if float((mx.exp(exact) * (exact - rows)).sum(axis=-1).mean()) > _SAME:
            break
        for fact in facts:
            if not fact.quantizable:
                continue
            pair = vars(caches[fact.index])["taken"]
            for role, x in zip(("key", "value"), pair, strict=True):
                plain = np.array(x[0, :, skip:].astype(mx.float32)).astype(np.float64)
                if role == "key" and fact.index in means:
                    plain -= plain[:, :AVERAGED].mean(axis=1, keepdims=True)
                outer = plain.swapaxes(-1, -2) @ plain / plain.shape[1]
                known = found.get((fact.index, role))
                found[fact.index, role] = outer if known is None else known + outer
    return found


def _places(length: int, context: int) -> list[int]:
    """Evenly from the beginning to where the context ends."""
    last = max(0, context - length)
    return sorted({last * part // (_PLACES - 1) for part in range(_PLACES)})
