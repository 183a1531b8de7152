"""Which layers of a model can have quantized caches, and the settings of them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

from quant.kv.cache import QuantizedStateCache
from quant.kv.measure import Forward, forward_of
from quant.kv.runtime import caches, install, own_caches, takes_quantized
from quant.kv.spec import FLOAT, KvSpec, LayerSpec, TensorSpec
from quant.kv.turbo import KvError

SPIKE: Final = 5.0
"""A key bias this many times the median layer's is one of those that ruin low-bit keys."""
_SLIGHT: Final = 10.0
"""No bias below this many times SPIKE is one, however small the others are."""
_READS_ITSELF: Final = (
    QuantizedStateCache.__name__,
    "incompatible function arguments",
    "'str' object has no attribute",  # the description in the cache's state, taken for keys
)
"""What an attention layer raises that computes with what the cache gives it, or with its state."""


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
    attention does not take quantized ones; each says so in ``reason``. KvError where the model is
    none that a text can be given to: a drafter, say, takes another model's states as well.
    """
    import mlx.core as mx

    runtime = type(model).__module__.partition(".")[0]
    install(runtime)
    forward = forward_of(model)
    try:
        own = own_caches(model)
        mx.eval(forward(mx.array([[1, 2, 3, 4]]), own))
    except Exception as error:  # whatever a runtime raises is a finding about the model
        raise KvError(
            f"{runtime} does not run its {type(model).__name__} on a text alone: {_first(error)}"
        ) from error
    biases = _key_biases(model)
    typical = median(biases.values()) if biases else 0.0
    facts = []
    for index, cache in enumerate(own):
        dims = [getattr(cache, name, None) for name in ("keys", "values")]
        reason, sizes = "", [0, 0]
        if not takes_quantized(cache):
            reason = f"its cache is {_a(type(cache).__name__)}, which stays as it is"
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
            said = _first(error)
            if any(mark in said for mark in _READS_ITSELF):
                said = "it reads keys and values itself"
            yield replace(fact, reason=f"the runtime's attention does not take it: {said}")
        else:
            yield fact


def _first(error: Exception) -> str:
    """The first line of what was raised, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _key_biases(model: Any) -> dict[int, float]:
    """Norm of the key projection's bias by layer."""
    import mlx.core as mx

    found: dict[int, float] = {}
    for index, layer in enumerate(model.layers):
        named = getattr(layer, "named_modules", list)  # Florence-2 gives the layers' numbers
        for name, module in named():
            if name.endswith("k_proj") and "bias" in module:
                found[index] = float(mx.linalg.norm(module.bias.astype(mx.float32)))
    return found


def spec_for(
    facts: Sequence[LayerFacts],
    choose: Callable[[LayerFacts], tuple[TensorSpec, TensorSpec]],
    *,
    means: Collection[int] | None = None,
    **settings: Any,
) -> KvSpec:
    """A spec with ``choose``'s (key, value) in each layer that can be quantized.

    ``means``: the layers whose keys' mean is taken off, all where it is None. KvError, naming the
    layer, when a head cannot be stored as chosen.
    """
    layers: list[LayerSpec | None] = []
    made = KvSpec(layers=())
    for fact in facts:
        if not fact.quantizable:
            layers.append(None)
            continue
        key, value = choose(fact)
        centred = {} if means is None else {"subtract_mean": fact.index in means}
        layer = LayerSpec(key=key, value=value, **{**centred, **settings})
        for tensor, dim, role in ((key, fact.key_dim, "key"), (value, fact.value_dim, "value")):
            try:
                tensor.codec(dim, made.rotation(dim))
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
            codec = tensor.codec(dim, spec.rotation(dim))
            total, weight = total + codec.effective_bits * dim, weight + dim
    return total / weight if weight else 16.0
