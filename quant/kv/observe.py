"""What a text shows of a model's caches before anything is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quant.kv.cache import AVERAGED
from quant.kv.coherence import coherences
from quant.kv.measure import forward_of
from quant.kv.rotation import Rotation
from quant.kv.runtime import own_caches
from quant.kv.scan import LayerFacts
from quant.kv.spec import SINKS
from quant.kv.split import Layout, layout, learned_layout
from quant.kv.spread import spreads

_GAIN: Final = 0.97
"""The keys' mean is taken off where that leaves this share of their energy, or less."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """By (layer, "key" or "value") what is stored beside the codes, and whose mean is taken off."""

    layouts: dict[tuple[int, str], Layout] = field(default_factory=dict)
    learned: dict[tuple[int, str], Layout] = field(default_factory=dict)
    """The same with bases learned from the text."""
    means: frozenset[int] = frozenset()
    """Layers whose keys have a mean worth taking off."""
    weighed: bool = False
    """Whether bases are of what errors cost, and not of what is stored alone."""

    def layout(self, fact: LayerFacts, role: str) -> Layout:
        """Of one tensor; the plain one where nothing was seen."""
        dim = fact.key_dim if role == "key" else fact.value_dim
        return self.layouts.get((fact.index, role), Layout(dim=dim))

    def choices(self, fact: LayerFacts, role: str) -> list[Layout]:
        """Of one tensor, all that there is to choose from.

        Values with a learned basis have no other choice: codes of a rotation are of the values'
        mean as well, and an error of it is in every token alike, so that attention to thousands
        keeps it and the trial's few hundred do not show it.
        """
        more = self.learned.get((fact.index, role))
        if more and role == "value":
            return [more]
        return [self.layout(fact, role), *([more] if more else [])]


def observed(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    bits: float,
    lesson: Sequence[int] = (),
    before: Sequence[int] = (),
) -> Seen:
    """Run ``ids`` through the model's own caches and look at keys and values.

    ``bits`` is about what a channel will cost, which decides how many channels are worth keeping
    aside. From the tokens ``lesson``, if any, bases are learned, and from the longer text
    ``before``, which they are by default, how alike is what attention adds up.
    """
    import mlx.core as mx

    own = own_caches(model)
    mx.eval(forward_of(model)(mx.array([list(ids)]), own))
    layouts: dict[tuple[int, str], Layout] = {}
    means: set[int] = set()
    vectors: dict[tuple[int, str], NDArray[np.float32]] = {}
    for fact in facts:
        if not fact.quantizable:
            continue
        cache = own[fact.index]
        keys, values = (
            np.array(x[0, :, SINKS : cache.offset].astype(mx.float32))
            for x in (cache.keys, cache.values)
        )
        # By the keys as they are: what is constant here may turn with the position later on.
        for role, x in (("key", keys), ("value", values)):
            dim = x.shape[-1]
            layouts[fact.index, role] = layout(x, bits, Rotation.random(dim, seed=dim))
            vectors[fact.index, role] = x
        one = layouts[fact.index, "key"]
        if one.aside:
            keys = keys.copy()
            np.put_along_axis(keys, np.array(one.aside)[:, None, :], 0.0, axis=-1)
        centred = keys - keys[:, :AVERAGED].mean(axis=1, keepdims=True)
        if _energy(centred) <= _GAIN * _energy(keys):
            means.add(fact.index)
    learned: dict[tuple[int, str], Layout] = {}
    weighed = False
    if lesson:
        found = spreads(model, facts, lesson, means=means, skip=SINKS, context=_context(model))
        weighed = all(spread.price() is not None for spread in found.values())
        for place, spread in found.items():
            # Values' mean is theirs wherever they are, keys' turns with the place.
            mean = spread.mean() if place[1] == "value" else np.zeros_like(spread.mean())
            learned[place] = learned_layout(
                vectors[place], spread.about(mean), mean, spread.price()
            )
        for place, ratio in coherences(model, before or lesson, learned, means).items():
            learned[place] = replace(learned[place], coherence=ratio)
    return Seen(layouts=layouts, learned=learned, means=frozenset(means), weighed=weighed)


def _context(model: Any) -> int:
    """Tokens that the model is made for, as far as it says."""
    given = getattr(model, "args", None) or getattr(model, "config", None)
    return int(getattr(given, "max_position_embeddings", None) or 0)


def _energy(x: NDArray[np.float32]) -> float:
    return float((x.astype(np.float64) ** 2).mean())
