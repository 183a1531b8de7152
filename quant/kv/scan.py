"""Which layers a cache may quantize, how much each one minds, and how to share the bits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any, Final

from quant.kv.cache import QuantizedStateCache
from quant.kv.codebook import distortion
from quant.kv.measure import Baseline, Forward, forward_of, loss
from quant.kv.replay import recorded
from quant.kv.runtime import caches, install, own_caches, takes_quantized
from quant.kv.spec import FLOAT, KvSpec, LayerSpec, TensorSpec
from quant.kv.turbo import KvError

SPIKE: Final = 5.0
"""A key bias this many times the median layer's is one of those that ruin low-bit keys."""
_SLIGHT: Final = 10.0
"""No bias below this many times SPIKE is one, however small the others are."""
CHUNK: Final = 64
WIDTHS: Final = (2, 3, 4, 5, 6, 8)
MEASURED: Final = (2, 4)
_TRIES: Final = 5


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What is known of one layer's cache before anything is measured."""

    index: int
    cache: str
    """The runtime's own class."""
    key_dim: int
    value_dim: int
    key_bias: float = 0.0
    """Norm of the key projection's bias."""
    spike: bool = False
    reason: str = ""
    """Why the layer stays in float; empty where it need not."""

    @property
    def quantizable(self) -> bool:
        """Whether a quantized cache can take its place."""
        return not self.reason


def static_scan(model: Any) -> tuple[LayerFacts, ...]:
    """Look at a loaded model's layers and run four tokens through its own caches.

    Layers with windows, recurrences or latent states keep the runtime's cache, as do those whose
    attention does not take quantized ones; each says so in ``reason``.
    """
    import mlx.core as mx

    runtime = type(model).__module__.partition(".")[0]
    install(runtime)
    forward, own = forward_of(model), own_caches(model)
    mx.eval(forward(mx.array([[1, 2, 3, 4]]), own))
    biases = _key_biases(model)
    typical = median(biases.values()) if biases else 0.0
    facts = []
    for index, cache in enumerate(own):
        dims = [getattr(cache, name, None) for name in ("keys", "values")]
        reason, sizes = "", [0, 0]
        if not takes_quantized(cache):
            reason = f"its cache is a {type(cache).__name__}, which stays as it is"
        elif any(dim is None or dim.ndim != 4 for dim in dims):
            reason = "it keeps no keys and values of heads"
        else:
            sizes = [int(dim.shape[-1]) for dim in dims if dim is not None]
        bias = biases.get(index, 0.0)
        facts.append(
            LayerFacts(
                index=index,
                cache=type(cache).__name__,
                key_dim=sizes[0],
                value_dim=sizes[1],
                key_bias=bias,
                spike=bias > SPIKE * max(typical, _SLIGHT),
                reason=reason,
            )
        )
    return tuple(_tried(model, forward, facts))


def _tried(model: Any, forward: Forward, facts: Sequence[LayerFacts]) -> Iterator[LayerFacts]:
    """Some attention layers never ask whether a cache is quantized: found by asking them once."""
    import mlx.core as mx

    probe = LayerSpec(key=TensorSpec(scheme="uniform", bits=8, group=32), value=FLOAT)
    for fact in facts:
        if not fact.quantizable:
            yield fact
            continue
        layers = tuple(probe if other.index == fact.index else None for other in facts)
        try:
            spec = KvSpec(layers=layers)
            mx.eval(forward(mx.array([[1, 2, 3, 4]]), caches(model, spec)))
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            said = str(error).splitlines()[0][:120]
            if QuantizedStateCache.__name__ in said or "incompatible function arguments" in said:
                said = "it reads keys and values itself"
            yield replace(fact, reason=f"the runtime's attention does not take it: {said}")
        else:
            yield fact


def _key_biases(model: Any) -> dict[int, float]:
    """Norm of the key projection's bias by layer."""
    import mlx.core as mx

    found: dict[int, float] = {}
    for index, layer in enumerate(model.layers):
        for name, module in layer.named_modules():
            if name.endswith("k_proj") and "bias" in module:
                found[index] = float(mx.linalg.norm(module.bias.astype(mx.float32)))
    return found


def spec_for(
    facts: Sequence[LayerFacts],
    choose: Callable[[LayerFacts], tuple[TensorSpec, TensorSpec]],
    **settings: Any,
) -> KvSpec:
    """A spec with ``choose``'s (key, value) in each layer that can be quantized.

    KvError, naming the layer, when a head cannot be stored as chosen.
    """
    layers: list[LayerSpec | None] = []
    made = KvSpec(layers=())
    for fact in facts:
        if not fact.quantizable:
            layers.append(None)
            continue
        key, value = choose(fact)
        layer = LayerSpec(key=key, value=value, **settings)
        for tensor, dim, role in ((key, fact.key_dim, "key"), (value, fact.value_dim, "value")):
            try:
                tensor.codec(dim, made.rotation(dim), "key" if role == "key" else "value")
            except KvError as error:
                raise KvError(f"layer {fact.index}, {role}s: {error}") from error
        layers.append(None if layer.is_float else layer)
    used = {dim for fact in facts if fact.quantizable for dim in (fact.key_dim, fact.value_dim)}
    rotations = {dim: made.rotation(dim) for dim in sorted(used)}
    return KvSpec(layers=tuple(layers), rotations=rotations)


def effective_bits(spec: KvSpec, facts: Sequence[LayerFacts]) -> float:
    """Bits per stored number over the layers that could be quantized, norms and scales counted."""
    total = weight = 0.0
    for fact, layer in zip(facts, spec.layers, strict=True):
        if not fact.quantizable:
            continue
        for role, dim in (("key", fact.key_dim), ("value", fact.value_dim)):
            tensor = FLOAT if layer is None else (layer.key if role == "key" else layer.value)
            codec = tensor.codec(dim, spec.rotation(dim), "key" if role == "key" else "value")
            total, weight = total + codec.effective_bits * dim, weight + dim
    return total / weight if weight else 16.0


@dataclass
class Sensitivity:
    """Mean KL with one tensor of one layer quantized, by (layer, role, bits)."""

    scheme: str
    kl: dict[tuple[int, str, int], float] = field(default_factory=dict)
    measured: frozenset[int] = frozenset()
    """The widths that were measured; the others follow from them."""


def sensitivity(
    model: Any,
    facts: Sequence[LayerFacts],
    ids: Sequence[int],
    *,
    measured: Sequence[int] = MEASURED,
    widths: Sequence[int] = WIDTHS,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Quantize one layer's keys or values at a time, at the widths ``measured``.

    All settings of a layer are the rows of one batch, which starts at that layer. The other
    ``widths`` follow from the distortion D of their codebooks: the loss is c D^p between two that
    were measured, and proportional to D beyond the widest, where the error is small.
    """
    found = Sensitivity("turboquant", measured=frozenset(measured))
    places = [(role, bits) for role in ("key", "value") for bits in measured]
    with recorded(model, ids, chunk=CHUNK) as replay:
        for fact in facts:
            if not fact.quantizable:
                continue
            if progress:
                progress(f"KV cache: layer {fact.index}")
            rows = [
                caches(model, _only(facts, fact.index, role, bits))[fact.index]
                for role, bits in places
            ]
            losses = replay.losses(fact.index, rows[0].merge(rows), len(rows))
            for role in ("key", "value"):
                known = {b: kl for (r, b), kl in zip(places, losses, strict=True) if r == role}
                dim = fact.key_dim if role == "key" else fact.value_dim
                for bits in widths:
                    found.kl[fact.index, role, bits] = _between(known, bits, dim)
    return found


def _between(known: dict[int, float], bits: int, dim: int) -> float:
    """The loss at ``bits`` from those at the widths of ``known``."""
    if bits in known:
        return known[bits]
    below = max((width for width in known if width < bits), default=min(known))
    above = min((width for width in known if width > bits), default=0)
    ratio = log(distortion(dim, bits) / distortion(dim, below))
    power = 1.0
    if above and min(known[above], known[below]) > 0.0:
        whole = log(distortion(dim, above) / distortion(dim, below))
        power = log(known[above] / known[below]) / whole
    return known[below] * exp(power * ratio)


def _only(facts: Sequence[LayerFacts], index: int, role: str, bits: int) -> KvSpec:
    tensor = TensorSpec(scheme="turboquant", bits=bits, tries=_TRIES)

    def choose(fact: LayerFacts) -> tuple[TensorSpec, TensorSpec]:
        if fact.index != index:
            return FLOAT, FLOAT
        return (tensor, FLOAT) if role == "key" else (FLOAT, tensor)

    return spec_for(facts, choose)


def allocate(
    facts: Sequence[LayerFacts], measured: Sensitivity, *, bits: float
) -> dict[tuple[int, str], int]:
    """Widths (16: float) with the least summed KL at ``bits`` effective bits on average.

    Starts from the narrowest everywhere and widens, one step of a lower convex hull at a time,
    where a bit saves most: the greedy solution of the knapsack, optimal up to its last step.
    KvError when not even the narrowest fits.
    """
    sizes = {
        (fact.index, role): dim
        for fact in facts
        if fact.quantizable
        for role, dim in (("key", fact.key_dim), ("value", fact.value_dim))
    }
    steps, cost, budget = [], 0.0, bits * sum(sizes.values())
    chosen: dict[tuple[int, str], int] = {}
    for place, dim in sizes.items():
        curve = [
            (width * dim + 16.0, kl, width)
            for (index, role, width), kl in measured.kl.items()
            if (index, role) == place
        ]
        curve.append((16.0 * dim, 0.0, 16))
        hull = _hull(sorted(curve))
        chosen[place] = hull[0][2]
        cost += hull[0][0]
        for (paid, before, _), (price, after, width) in pairwise(hull):
            steps.append(((before - after) / (price - paid), place, price - paid, width))
    if cost > budget:
        least = cost / sum(sizes.values())
        raise KvError(f"{bits} bits are too few: the narrowest choice has {least:.3f}")
    # On a hull later steps of a place save less per bit, so that its steps come in order.
    blocked: set[tuple[int, str]] = set()
    for _, place, price, width in sorted(steps, key=lambda step: -step[0]):
        if place in blocked:
            continue
        if cost + price > budget:
            blocked.add(place)
            continue
        cost += price
        chosen[place] = width
    return chosen


def _hull(curve: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Of (price, loss, width) by price, the lower convex hull of those that lower the loss."""
    hull: list[tuple[float, float, int]] = []
    for point in curve:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocated_spec(
    facts: Sequence[LayerFacts], chosen: dict[tuple[int, str], int], **settings: Any
) -> KvSpec:
    """The spec of an allocation."""

    def tensor(place: tuple[int, str]) -> TensorSpec:
        width = chosen[place]
        if width == 16:
            return FLOAT
        return TensorSpec(scheme="turboquant", bits=width, tries=_TRIES)

    return spec_for(
        facts, lambda fact: (tensor((fact.index, "key")), tensor((fact.index, "value"))), **settings
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
