"""A text run further on in a model's context: what its caches were given, and what errors cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from quant.kv.measure import forward_of
from quant.kv.runtime import install, own_caches

_SEED: Final = 7
Shifts = Mapping[int, Sequence[Any]]
"""By layer what is added to the result of each attention over its cache."""


class Further:
    """A runtime's empty cache that says it is further on in a text.

    One that is ``watched`` is read by attention as caches of ours are, and keeps what it is given
    and what is asked of it. Layers that share an earlier layer's keys ask that one's cache.
    """

    def __init__(self, cache: Any, place: int, *, watched: bool, shifts: Sequence[Any]) -> None:
        vars(self).update(cache=cache, place=place, watched=watched, shifts=shifts)
        vars(self).update(taken=None, scale=1.0, queries=[], results=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["cache"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["cache"], name, value)

    @property
    def offset(self) -> Any:
        """The runtime's own, further on."""
        return self.cache.offset + self.place

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        """Take a whole text [1, heads, length, dim]."""
        found = self.cache.update_and_fetch(keys, values)
        if not self.watched:
            return found
        vars(self)["taken"] = (keys, values)
        return self, self

    def attend(self, queries: Any, *, scale: float, mask: Any = None) -> Any:
        """Attention over the text, as the runtime's."""
        import mlx.core as mx

        keys, values = self.taken
        found = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        if self.shifts:
            found = found + self.shifts[len(self.results)]
        vars(self)["scale"] = scale
        self.queries.append(queries)
        self.results.append(found)
        return found


def run(
    model: Any,
    ids: Sequence[int],
    place: int,
    *,
    watched: Collection[int] = (),
    shifts: Shifts | None = None,
) -> tuple[Any, dict[int, Further]]:
    """Log-probabilities [length, vocabulary] of ``ids`` from position ``place`` on.

    And the caches of the layers ``watched``, which static_scan has found to be read by attention.
    """
    import mlx.core as mx

    install(type(model).__module__.partition(".")[0])
    caches = [
        Further(cache, place, watched=index in watched, shifts=(shifts or {}).get(index, ()))
        if hasattr(cache, "update_and_fetch")
        else cache
        for index, cache in enumerate(own_caches(model))
    ]
    rows = forward_of(model)(mx.array([list(ids)]), caches)[0].astype(mx.float32)
    rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    return rows, {index: caches[index] for index in watched}


def slopes(
    model: Any, ids: Sequence[int], place: int, rows: Any, seen: Mapping[int, Further]
) -> dict[int, list[Any]] | None:
    """By layer how the text's log-probability changes with each result of attention in a run.

    ``rows`` and ``seen`` are what :func:`run` gave. Tokens are drawn from the predictions, not from
    the text, so that the mean outer product of slopes is the Fisher information F: results that are
    off by e cost e^T F e / 2 nats of KL, to second order. None where the runtime has no derivative
    of something that the model computes.
    """
    import mlx.core as mx

    drawn = mx.random.categorical(rows, key=mx.random.key(_SEED))[:, None]
    mx.eval(drawn)

    def likelihood(shifts: Shifts) -> Any:
        found, _ = run(model, ids, place, watched=seen, shifts=shifts)
        return mx.take_along_axis(found, drawn, axis=-1).sum()

    still = {index: [mx.zeros(x.shape) for x in cache.results] for index, cache in seen.items()}
    was = model.training
    model.train()  # recurrences take a way that has a derivative then: their kernels have none
    try:
        found: dict[int, list[Any]] = mx.grad(likelihood)(still)
        mx.eval(found)
    except (ValueError, RuntimeError):
        return None
    finally:
        model.train(was)
    return found
