"""Running a model from one of its layers on: what comes before is taken from a recording.

Where only one layer's cache differs, the layers before it compute what they did with float caches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quant.kv.measure import Baseline, Forward, baseline, forward_of, rowwise
from quant.kv.runtime import own_caches

_SAME = 1e-6
"""Mean KL, in nats, up to which a replay is what was recorded."""


class _StandIn:
    """Takes a layer's place in the model's list and is that layer in every other respect."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.calls: list[Any] = []
        self.played: tuple[int, int] | None = None
        """(call, batch) that is given again instead of computed."""
        self.recording = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.played is not None:
            call, batch = self.played
            return _repeated(self.calls[call], batch)
        out = self.layer(*args, **named)
        if self.recording:
            self.calls.append(out)
        return out


class Replay:
    """A text's float pass through ``model``, and passes that start at a layer of it.

    ``exact`` is the text's baseline. Where the model's layers are not a plain list with a cache
    each, or replaying does not give what was recorded, ``shared`` is False and every pass runs
    whole. Memory: the outputs of all layers for the text, in float32.
    """

    def __init__(self, model: Any, exact: Baseline, stands: list[_StandIn], marks: Any) -> None:
        self.model = model
        self.exact = exact
        self._stands = stands
        self._marks = marks
        self.shared = bool(stands)

    def losses(self, index: int, cache: Any, batch: int) -> list[float]:
        """Mean KL by row, with ``cache`` (of ``batch`` rows) as the cache of layer ``index``."""
        live = own_caches(self.model)
        live[index] = cache
        forward = self._from(index, live, batch) if self.shared else forward_of(self.model)
        return [row["prefill"].kl_mean for row in rowwise(forward, live, self.exact, batch)]

    def _from(self, index: int, live: list[Any], batch: int) -> Forward:
        whole, call = forward_of(self.model), iter(range(len(self._marks)))

        def forward(ids: Any, caches: list[Any]) -> Any:
            number = next(call)
            for stand in self._stands[:index]:
                stand.played = (number, batch)
            try:
                return whole(ids, [*self._marks[number][:index], *live[index:]])
            finally:
                for stand in self._stands[:index]:
                    stand.played = None

        return forward


@contextmanager
def recorded(model: Any, ids: Sequence[int], *, chunk: int) -> Iterator[Replay]:
    """Record ``ids`` going through ``model`` in pieces; its layers are its own again afterwards."""
    originals, own = list(model.layers), own_caches(model)
    layers = _home(model, originals)
    stands = [_StandIn(layer) for layer in originals]
    plain = len(own) == len(originals)
    if layers is None:
        plain = False
    elif plain:
        layers[:] = stands
    try:
        marks: list[list[Any]] = []
        for stand in stands:
            stand.recording = plain
        exact = baseline(_marking(forward_of(model), marks), own, ids, chunk=chunk, start=chunk)
        for stand in stands:
            stand.recording = False
        # Layers that a call passed over, or made twice, cannot be told apart by their number.
        plain = plain and all(len(stand.calls) == len(marks) for stand in stands)
        replay = Replay(model, exact, stands if plain else [], marks)
        if plain:
            last = len(own) - 1
            replay.shared = replay.losses(last, own_caches(model)[last], 1)[0] < _SAME
        yield replay
    finally:
        if layers is not None:
            layers[:] = originals


def _home(model: Any, layers: Sequence[Any]) -> list[Any] | None:
    """The list that holds the model's layers, which ``model.layers`` may hand out as a copy."""
    for _, module in model.named_modules():
        for value in module.values():
            if isinstance(value, list) and [*map(id, value)] == [*map(id, layers)]:
                return value
    return None


def _marking(forward: Forward, marks: list[list[Any]]) -> Forward:
    """Keeps the caches as they were before each call: whoever passes layers over needs offsets."""

    def marked(ids: Any, caches: list[Any]) -> Any:
        marks.append([copy.copy(cache) for cache in caches])
        return forward(ids, caches)

    return marked


def _repeated(out: Any, batch: int) -> Any:
    import mlx.core as mx

    if isinstance(out, mx.array):
        return mx.broadcast_to(out, (batch, *out.shape[1:])) if out.shape[:1] == (1,) else out
    if isinstance(out, tuple | list):
        return type(out)(_repeated(one, batch) for one in out)
    return out
