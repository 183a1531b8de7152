"""Quantized caches in the stock runtimes: made for a model, taken by its attention."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import Any, Final

from quant.kv.batch import BatchQuantizedStateCache
from quant.kv.cache import QuantizedStateCache
from quant.kv.spec import KvSpec
from quant.kv.turbo import KvError

_RUNTIMES: Final = ("mlx_lm", "mlx_vlm")
_ATTENTION: Final = "quantized_scaled_dot_product_attention"
_WHOLE: Final = "scaled_dot_product_attention"
_LENGTH: Final = "kv_sequence_length"
_READS: Final = "reads_quantized_state"
"""What marks a function of a runtime that is wrapped already."""
_OURS: Final = (QuantizedStateCache, BatchQuantizedStateCache)


def caches(model: Any, spec: KvSpec) -> list[Any]:
    """Prompt caches for a loaded model of mlx-lm or of mlx-vlm's language model.

    Pass them as ``prompt_cache``. Layers that ``spec`` keeps in float, and those whose own cache
    is none that grows by a token a time (sliding windows, recurrences), have the runtime's own.
    KvError when the model has another number of caches, or a layer cannot be what is asked.
    """
    own = own_caches(model)
    install(type(model).__module__.partition(".")[0])
    return _replaced(own, spec)


def use(model: Any, spec: KvSpec) -> None:
    """Let a loaded model make quantized caches from now on, whoever asks it for caches.

    So they reach what makes its caches itself: the servers and batch generators of both runtimes.
    ``model`` is what :func:`caches` takes. A second call replaces the settings of the first.
    """
    vars(model).pop("make_cache", None)
    caches(model, spec)  # refuses now what it would refuse later

    def make_cache() -> list[Any]:
        return _replaced(stock(), spec)

    runtime = type(model).__module__.partition(".")[0]
    plain = import_module(f"{runtime}.models.cache").KVCache
    stock = getattr(model, "make_cache", lambda: [plain() for _ in model.layers])
    model.make_cache = make_cache


def _replaced(own: list[Any], spec: KvSpec) -> list[Any]:
    if len(own) != len(spec.layers):
        raise KvError(f"the model has {len(own)} caches, the settings {len(spec.layers)} layers")
    made: list[Any] = []
    for index, (cache, layer) in enumerate(zip(own, spec.layers, strict=True)):
        if layer is None or layer.is_float:
            made.append(cache)
        elif takes_quantized(cache):
            made.append(QuantizedStateCache(layer, spec.rotations))
        else:
            raise KvError(f"layer {index} has a {type(cache).__name__}, which stays in float")
    return made


def own_caches(model: Any) -> list[Any]:
    """The caches that the model's runtime gives it. KvError for a model of neither runtime."""
    runtime = type(model).__module__.partition(".")[0]
    if runtime not in _RUNTIMES:
        raise KvError(f"{type(model).__name__} is a model of neither {' nor '.join(_RUNTIMES)}")
    made: list[Any] = import_module(f"{runtime}.models.cache").make_prompt_cache(model)
    return made


def takes_quantized(cache: Any) -> bool:
    """Whether a runtime's cache is one that only grows, token by token."""
    return type(cache).__name__ == "KVCache"


def install(runtime: str) -> None:
    """Let a runtime's attention read these caches; does nothing a second time.

    Both runtimes send caches that have ``bits`` through one function of their base module. It is
    wrapped: for a cache of ours it hands the queries over, for any other it is what it was. So are
    the function before it, wherever a model's module has taken it, because layers that read the
    keys of an earlier layer call it without a cache, and the one that measures keys in mlx-vlm.
    """
    base: Any = import_module(f"{runtime}.models.base")
    for name, wrapped in ((_ATTENTION, _reading), (_WHOLE, _reading), (_LENGTH, _measuring)):
        stock = getattr(base, name, None)  # mlx-lm has no function for lengths
        if stock is not None and not hasattr(stock, _READS):
            setattr(base, name, wrapped(stock))
    for path, module in list(sys.modules.items()):
        for name in (_WHOLE, _LENGTH):
            taken = path.startswith(f"{runtime}.models.") and getattr(module, name, None)
            if taken and taken is getattr(base, name).__wrapped__:
                setattr(module, name, getattr(base, name))
    # Saved prompt caches name their class; the loader looks among the runtime's own.
    home: Any = sys.modules[f"{runtime}.models.cache"] if runtime in sys.modules else None
    if home is None:
        home = import_module(f"{runtime}.models.cache")
    for one in _OURS:
        setattr(home, one.__name__, one)


@contextmanager
def dense_on_cpu(runtime: str) -> Iterator[None]:
    """Let the runtime's affine caches be attended to unpacked while the block runs, on a CPU.

    Quantized products are a hundred times slower there; unpacked they have the same factors, so
    that only the order of accumulation differs. Does nothing on other backends.
    """
    import mlx.core as mx

    base: Any = import_module(f"{runtime}.models.base")
    stock = getattr(base, _ATTENTION)

    def attention(
        queries: Any,
        keys: Any,
        values: Any,
        scale: float,
        mask: Any,
        group_size: int = 64,
        bits: int = 8,
    ) -> Any:
        if _attends(keys):
            return keys.attend(queries, scale=scale, mask=mask)
        k, v = (
            mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
            for words, scales, biases in (keys, values)
        )
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=mask)

    if mx.default_device() != mx.Device(mx.cpu):
        yield
        return
    setattr(base, _ATTENTION, attention)
    try:
        yield
    finally:
        setattr(base, _ATTENTION, stock)


def _attends(keys: Any) -> bool:
    """Whether what stands for keys answers queries itself: a cache of ours, or a watched one."""
    return hasattr(keys, "attend")


def _reading(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``stock``, of queries, keys, values and more, but for keys that are a cache of ours."""
    order = list(signature(stock).parameters)[3:]

    @wraps(stock)
    def attention(queries: Any, keys: Any, values: Any, *args: Any, **named: Any) -> Any:
        if not _attends(keys):
            return stock(queries, keys, values, *args, **named)
        given = {**dict(zip(order, args, strict=False)), **named}
        if given.get("sinks") is not None:
            raise ValueError("quantized caches are not attended to with attention sinks")
        return keys.attend(queries, scale=given["scale"], mask=given.get("mask"))

    vars(attention)[_READS] = True
    return attention


def _measuring(stock: Callable[[Any], int]) -> Callable[[Any], int]:
    """``stock``, the sequence length of keys, but for keys that are a cache of ours."""

    @wraps(stock)
    def length(keys: Any) -> int:
        return int(keys.size()) if _attends(keys) else stock(keys)

    vars(length)[_READS] = True
    return length
