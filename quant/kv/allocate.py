"""How much each layer minds a quantized cache, and how to share the bits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, log
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
MEASURED: Final = (1, 2, 4)
Place = tuple[int, str]
"""Layer, and "key" or "value"."""
_NOTHING: Final = Seen()
_LEAST: Final = 1e-12
"""What rounding takes below it counts as this loss."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to store one tensor: ``layout`` with codes of ``bits`` (16: float), which costs
    ``price`` bits a vector, and with which the mean KL is ``kl``.
    """

    layout: Layout
    bits: float
    price: float
    kl: float
    measured: bool = False
    """Whether ``kl`` was measured, and does not follow from what was."""

    @property
    def tensor(self) -> TensorSpec:
        """As it is stored."""
        return FLOAT if self.bits == 16 else self.layout.tensor(self.bits)


Sensitivity = dict[Place, list[Choice]]
"""What there is to choose from, by the tensor that alone is quantized."""


def sensitivity(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    seen: Seen = _NOTHING,
    measured: Sequence[float] = MEASURED,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Quantize one layer's keys or values at a time, at the widths ``measured``.

    All settings of a layer are the rows of one batch, which starts at that layer. Each tensor is
    stored in every layout that ``seen`` has for it. Losses at other widths follow from their
    expected error D: the loss is c D^p between two that were measured, and proportional to D beyond
    the widest, where the error is small.
    """
    found: Sensitivity = {}
    with recorded(model, ids, chunk=CHUNK) as replay:
        for fact in facts:
            if not fact.quantizable:
                continue
            if progress:
                progress(f"KV cache: layer {fact.index}")
            tried = [
                (role, one, width)
                for role in ("key", "value")
                for one in seen.choices(fact, role)
                for width in dict.fromkeys(
                    max(one.widest(bits * one.dim + 16), UNIT / one.dim) for bits in measured
                )
            ]
            rows = [
                caches(model, _only(facts, seen, fact.index, role, one.tensor(bits)))[fact.index]
                for role, one, bits in tried
            ]
            losses = replay.losses(fact.index, rows[0].merge(rows), len(rows))
            known: dict[tuple[str, Layout], dict[float, float]] = {}
            for (role, one, bits), kl in zip(tried, losses, strict=True):
                known.setdefault((role, one), {})[bits] = max(kl, _LEAST)
            for (role, one), kls in known.items():
                found.setdefault((fact.index, role), []).extend(choices(one, kls))
    return found


def choices(one: Layout, known: Mapping[float, float]) -> list[Choice]:
    """A layout at every width from the narrowest of ``known`` on, which has losses by width."""
    first = round(min(known) * one.dim / UNIT)
    widths = [units * UNIT / one.dim for units in range(first, one.dim + 1)]
    return [
        Choice(
            layout=one,
            bits=bits,
            price=one.price(bits),
            kl=_between(known, bits, one),
            measured=bits in known,
        )
        for bits in widths
    ]


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
    facts: Sequence[LayerFacts], measured: Sensitivity, *, bits: float
) -> dict[Place, Choice]:
    """Of each tensor the choice with which the summed KL is least at ``bits`` effective bits.

    Starts from the cheapest everywhere and goes on, one step of a lower convex hull at a time,
    where a bit saves most: the greedy solution of the knapsack. Layouts are on one hull, so that
    they are compared at equal bytes. What is left when a step does not fit is spent on the best
    choice that does. KvError when not even the cheapest fits.
    """
    dims = {
        (fact.index, role): dim
        for fact in facts
        if fact.quantizable
        for role, dim in (("key", fact.key_dim), ("value", fact.value_dim))
    }
    numbers = sum(dims.values())
    steps: list[tuple[float, Place, Choice]] = []
    chosen: dict[Place, Choice] = {}
    for place, dim in dims.items():
        whole = Choice(layout=Layout(dim=dim), bits=16, price=16.0 * dim, kl=0.0)
        hull = _hull([*measured[place], whole])
        chosen[place] = hull[0]
        steps += [(-_slope(before, after), place, after) for before, after in pairwise(hull)]
    left = bits * numbers - sum(one.price for one in chosen.values())
    if left < 0:
        least = bits - left / numbers
        raise KvError(f"{bits} bits are too few: the narrowest choice has {least:.3f}")
    # On a hull later steps of a place save less per bit, so that its steps come in order.
    blocked: set[Place] = set()
    for _, place, step in sorted(steps, key=lambda step: -step[0]):
        if place in blocked:
            continue
        now = chosen[place]
        if step.price - now.price > left:
            blocked.add(place)
            fit = [one for one in measured[place] if one.price - now.price <= left]
            step = min([now, *fit], key=lambda one: (one.kl, one.price))
        left -= step.price - now.price
        chosen[place] = step
    return chosen


def _hull(curve: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull, by price, of those that lower the loss."""
    hull: list[Choice] = []
    for point in sorted(curve, key=lambda one: (one.price, one.kl)):
        if hull and point.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.kl - a.kl) / (b.price - a.price)


def allocated_spec(
    facts: Sequence[LayerFacts],
    chosen: Mapping[Place, Choice],
    seen: Seen = _NOTHING,
    **settings: Any,
) -> KvSpec:
    """The spec of an allocation."""
    return spec_for(
        facts,
        lambda fact: (chosen[fact.index, "key"].tensor, chosen[fact.index, "value"].tensor),
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
