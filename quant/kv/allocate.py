"""How much each layer minds a quantized cache, and how to share the bits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log, prod
from typing import Any, Final

from quant.kv.codes import UNIT
from quant.kv.measure import Baseline, forward_of, loss
from quant.kv.observe import Seen
from quant.kv.replay import recorded
from quant.kv.runtime import caches
from quant.kv.scan import LayerFacts, spec_for
from quant.kv.spec import FLOAT, KvSpec, TensorSpec
from quant.kv.split import Layout
from quant.kv.turbo import KvError

CHUNK: Final = 64
WIDTHS: Final = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8)
MEASURED: Final = (1, 2, 4)
_NOTHING: Final = Seen()


@dataclass
class Sensitivity:
    """Mean KL with one tensor of one layer quantized, by (layer, role, bits)."""

    scheme: str
    kl: dict[tuple[int, str, float], float] = field(default_factory=dict)
    measured: set[tuple[int, str, float]] = field(default_factory=set)
    """What was measured; the others follow from it."""
    seen: Seen = _NOTHING
    """With the layout of each tensor that lost least."""


def sensitivity(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    seen: Seen = _NOTHING,
    measured: Sequence[float] = MEASURED,
    widths: Sequence[float] = WIDTHS,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Quantize one layer's keys or values at a time, at the widths ``measured``.

    All settings of a layer are the rows of one batch, which starts at that layer. Each tensor is
    stored in every layout that ``seen`` has for it, in as many bytes; the one with the least
    geometric mean of losses is kept. The other ``widths`` follow from their expected error D: the
    loss is c D^p between two that were measured, and proportional to D beyond the widest, where
    the error is small.
    """
    found = Sensitivity("turboquant")
    layouts = dict(seen.layouts)
    with recorded(model, ids, chunk=CHUNK) as replay:
        for fact in facts:
            if not fact.quantizable:
                continue
            if progress:
                progress(f"KV cache: layer {fact.index}")
            tried = [
                (role, one, max(one.widest(bits * one.dim + 16), UNIT / one.dim))
                for role in ("key", "value")
                for one in seen.choices(fact, role)
                for bits in measured
            ]
            rows = [
                caches(model, _only(facts, seen, fact.index, role, one.tensor(bits)))[fact.index]
                for role, one, bits in tried
            ]
            losses = replay.losses(fact.index, rows[0].merge(rows), len(rows))
            for role in ("key", "value"):
                place = fact.index, role
                known: dict[Layout, dict[float, float]] = {}
                for (of, one, bits), kl in zip(tried, losses, strict=True):
                    if of == role:
                        known.setdefault(one, {})[bits] = kl
                one = min(known, key=lambda one: geometric_mean(known[one]))
                layouts[place] = one
                found.measured |= {(*place, bits) for bits in known[one]}
                for bits in {*widths, *known[one]}:
                    if abs(bits * one.dim / UNIT - round(bits * one.dim / UNIT)) < 1e-6:
                        found.kl[(*place, bits)] = _between(known[one], bits, one)
    found.seen = replace(seen, layouts=layouts)
    return found


def geometric_mean(known: Mapping[float, float]) -> float:
    """Of losses by width: of two widths that one layout has for three, as many count.

    What rounding takes below zero counts as next to nothing.
    """
    return float(prod(max(kl, 1e-12) for kl in known.values()) ** (1 / len(known)))


def _between(known: Mapping[float, float], bits: float, one: Layout) -> float:
    """The loss at ``bits`` from those at the widths of ``known``."""
    if bits in known:
        return known[bits]
    order = sorted(known)
    power, near = 1.0, max((width for width in order if width < bits), default=order[0])
    if bits < order[-1] and len(order) > 1:
        low, high = next(pair for pair in pairwise(order) if bits < pair[1])
        if min(known[low], known[high]) > 0.0:
            power = log(known[high] / known[low]) / log(one.error(high) / one.error(low))
    return known[near] * exp(power * log(one.error(bits) / one.error(near)))


def _only(
    facts: Sequence[LayerFacts], seen: Seen, index: int, role: str, tensor: TensorSpec
) -> KvSpec:
    def choose(fact: LayerFacts) -> tuple[TensorSpec, TensorSpec]:
        if fact.index != index:
            return FLOAT, FLOAT
        return (tensor, FLOAT) if role == "key" else (FLOAT, tensor)

    return spec_for(facts, choose, means=seen.means)


def allocate(
    facts: Sequence[LayerFacts], measured: Sensitivity, *, bits: float, seen: Seen = _NOTHING
) -> dict[tuple[int, str], float]:
    """Widths (16: float) with the least summed KL at ``bits`` effective bits on average.

    Starts from the narrowest everywhere and widens, one step of a lower convex hull at a time,
    where a bit saves most: the greedy solution of the knapsack. What is left when a step does not
    fit is spent on a part of it, in units of eight channels.
    KvError when not even the narrowest fits.
    """
    layouts = {
        (fact.index, role): seen.layout(fact, role)
        for fact in facts
        if fact.quantizable
        for role in ("key", "value")
    }
    numbers = sum(one.dim for one in layouts.values())
    steps, cost, budget = [], 0.0, bits * numbers
    chosen: dict[tuple[int, str], float] = {}
    for place, one in layouts.items():
        curve: list[tuple[float, float, float]] = [
            (one.price(width), kl, width)
            for (index, role, width), kl in measured.kl.items()
            if (index, role) == place
        ]
        curve.append((16.0 * one.dim, 0.0, 16))
        hull = _hull(sorted(curve))
        chosen[place] = hull[0][2]
        cost += hull[0][0]
        for (paid, before, _), (price, after, width) in pairwise(hull):
            steps.append(((before - after) / (price - paid), place, price - paid, width))
    if cost > budget:
        raise KvError(f"{bits} bits are too few: the narrowest choice has {cost / numbers:.3f}")
    # On a hull later steps of a place save less per bit, so that its steps come in order.
    blocked: set[tuple[int, str]] = set()
    for _, place, price, width in sorted(steps, key=lambda step: -step[0]):
        if place in blocked:
            continue
        if cost + price > budget:
            blocked.add(place)
            one = layouts[place]
            paid = one.price(chosen[place])
            part = one.widest(paid + budget - cost)
            if chosen[place] < part < width:
                chosen[place] = part
                cost += one.price(part) - paid
            continue
        cost += price
        chosen[place] = width
    return chosen


def _hull(curve: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Of (price, loss, width) by price, the lower convex hull of those that lower the loss."""
    hull: list[tuple[float, float, float]] = []
    for point in curve:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocated_spec(
    facts: Sequence[LayerFacts],
    chosen: dict[tuple[int, str], float],
    seen: Seen = _NOTHING,
    **settings: Any,
) -> KvSpec:
    """The spec of an allocation."""

    def tensor(fact: LayerFacts, role: str) -> TensorSpec:
        width = chosen[fact.index, role]
        return FLOAT if width == 16 else seen.layout(fact, role).tensor(width)

    return spec_for(
        facts,
        lambda fact: (tensor(fact, "key"), tensor(fact, "value")),
        means=seen.means,
        **settings,
    )


def halves(spec: KvSpec) -> dict[str, KvSpec]:
    """The same spec with only the keys, and only the values, quantized."""
    keys = [layer and replace(layer, value=FLOAT) for layer in spec.layers]
    values = [layer and replace(layer, key=FLOAT) for layer in spec.layers]
    return {
        "keys only": replace(spec, layers=tuple(keys)),
        "values only": replace(spec, layers=tuple(values)),
    }


def joint(model: Any, spec: KvSpec, exact: Baseline) -> dict[str, dict[str, dict[str, float]]]:
    """The loss of everything together, of the keys alone, and of the values alone.

    By "prefill" and "decode", then by which of the three.
    """
    forward = forward_of(model)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, one in {"all": spec, **halves(spec)}.items():
        for part, measured in loss(forward, caches(model, one), exact).items():
            found.setdefault(part, {})[name] = measured.to_json()
    return found
