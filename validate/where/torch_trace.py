"""Tracing the torch reference, and measuring its own noise on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from quant.dotted import shared_end
from validate.loaded import Written, written_tensors
from validate.where.bearing import Bearing, bearing_of
from validate.where.trace import MOST, Trace, kept_rows

WIDE_BYTES: Final = 2 << 30
"""Largest float64 copy of a model that is made to measure its noise."""
_SEEN: Final = 64
"""Values that tell a tensor from any other of its size."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt's trace in float32, the same computed otherwise, and where the weights are held."""

    trace: Trace
    again: Trace
    noise: str
    """How the second trace was computed."""
    held: Mapping[str, str]
    """Source tensor -> the torch parameter that holds it."""
    logits: Any
    """[tokens, vocabulary] of the first run; an encoder's states [tokens, size]."""
    bearing: Bearing = field(default_factory=dict)
    """What of the trace the result depends on, where that was asked."""


Call = Callable[[Any, Mapping[str, Any]], Any]
"""What a model makes of its inputs: logits or states of one prompt, as a tensor of two axes."""


def logits_of(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Logits of every token of a prompt, [tokens, vocabulary]."""
    return model(**inputs, use_cache=False).logits[0]


def states_of(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Last hidden state of a prompt or a picture, [positions, size]."""
    return model(**inputs).last_hidden_state[0]


def trace_reference(
    model: Any,
    folder: Path,
    inputs: Mapping[str, Any],
    *,
    most: int = MOST,
    call: Call = logits_of,
    bearing: bool = False,
) -> Reference:
    """Run prepared ``inputs`` of batch one through a float32 model loaded from ``folder``.

    At most ``most`` values are kept of each module's call. ``call`` is what is asked of the model.
    ``bearing`` also finds what the result depends on, of a model of which a copy could be made.
    """
    import torch

    held = _held(model, folder)
    modules = {name for name, _ in model.named_modules() if name}
    size = 8 * sum(value.numel() for value in model.parameters())
    matters: Bearing = {}
    if bearing and size <= WIDE_BYTES:
        matters = bearing_of(
            model, inputs, first=_first, ordered=_channels_last, call=call, most=most
        )
    trace, logits = _run(model, inputs, modules, most, call)
    # Complex tables of rotations would lose their imaginary parts.
    if size <= WIDE_BYTES and not any(value.is_complex() for value in model.buffers()):
        wide = copy.deepcopy(model).to(torch.float64)
        try:
            with _default_dtype(torch.float64):
                again, _ = _run(wide, _cast(inputs, torch.float64), modules, most, call)
            return Reference(trace, again, "float64", held, logits, matters)
        except (RuntimeError, TypeError):
            pass  # an operation that this class only has in float32
        finally:
            del wide
    again, _ = _run(model, inputs, modules, most, call, change=_Disturbance())
    return Reference(trace, again, "one rounding per module", held, logits, matters)


class _Disturbance:
    """Multiplies by 1 + e, e uniform in one unit in the last place of float32, the same always."""

    def __init__(self) -> None:
        import torch

        self._random = torch.Generator().manual_seed(0)

    def __call__(self, value: Any) -> Any:
        import torch

        noise = torch.rand(value.shape, generator=self._random, dtype=torch.float32)
        return value * (1 + (noise - 0.5) * 2.0**-23)


def _run(
    model: Any,
    inputs: Mapping[str, Any],
    modules: set[str],
    most: int,
    call: Call,
    *,
    change: Callable[[Any], Any] | None = None,
) -> tuple[Trace, Any]:
    import torch

    trace = Trace(most)

    def before(path: str) -> Callable[..., None]:
        def hook(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = _first((*given, *named.values()))
            if value is not None:
                trace.add(path, "in", *_kept(_channels_last(module, value), trace.most))

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: Any, given: Any, output: Any) -> Any:
            value = _first(output if isinstance(output, tuple | list) else (output,))
            if value is None:
                return None
            trace.add(path, "out", *_kept(_channels_last(module, value), trace.most))
            if change is not None and isinstance(output, torch.Tensor):
                return change(output)
            return None

        return hook

    hooks = []
    for path, module in model.named_modules():
        if path in modules:
            hooks.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(path)))
    try:
        with torch.inference_mode():
            output = call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return trace, _numpy(output)


def _first(values: Any) -> Any:
    """The first tensor of floats: hidden states come before masks and positions."""
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
        state = getattr(value, "last_hidden_state", None)
        if isinstance(state, torch.Tensor):
            return state
    return None


def _channels_last(module: Any, value: Any) -> Any:
    """What a convolution takes or gives, with its channels where MLX has them."""
    import torch

    if not isinstance(module, torch.nn.modules.conv._ConvNd):
        return value
    axis = value.ndim - len(module.kernel_size) - 1
    return value.movedim(axis, -1) if axis in (0, 1) else value


def _kept(value: Any, most: int) -> tuple[Any, tuple[int, ...]]:
    """The values to keep of a call, and the shape of all of them."""
    shape = tuple(value.shape)
    rows = kept_rows(shape, most)
    return _numpy(value if rows is None else value.reshape(-1, shape[-1])[rows]), shape


def _numpy(value: Any) -> Any:
    return value.detach().float().cpu().numpy().copy()


def _cast(inputs: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    import torch

    return {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    """Classes that make masks and tables in the default dtype make them in this one."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _held(model: Any, folder: Path) -> dict[str, str]:
    """Which parameter holds each tensor of the checkpoint: by its name, else by its values.

    A tensor that is held in no parameter of its own, as an expert that is stacked with others, is
    put into the innermost module that has its place in the tree.
    """
    written = written_tensors(folder)
    parameters = {name: value for name, value in model.state_dict().items() if value.ndim}
    held = {name: name for name in written if name in parameters}
    left = [name for name in written if name not in held]
    if not left:
        return held
    taken = set(held.values())
    by_values: dict[bytes, list[str]] = {}
    for name, value in parameters.items():
        if name not in taken:
            print_ = _print(value.numel(), value.reshape(-1)[:_SEEN].float().numpy())
            by_values.setdefault(print_, []).append(name)
    for name in left:
        tensor = written[name]
        found = by_values.get(_print(_count(tensor), _values(tensor)), [])
        if found:
            held[name] = max((shared_end(path, name), path) for path in found)[1]
    places = _places(held)
    modules = {path for path, _ in model.named_modules()}
    for name in left:
        if name not in held and (place := _place(name, places, modules)):
            held[name] = f"{place}.{name}"
    return held


def _places(held: Mapping[str, str]) -> dict[str, str]:
    """Modules as the checkpoint names them -> as the model does, above the tensors of both."""
    places: dict[str, str] = {}
    for name, path in held.items():
        while name and path and name.rpartition(".")[2] == path.rpartition(".")[2]:
            name, path = name.rpartition(".")[0], path.rpartition(".")[0]
            places.setdefault(name, path)
    return places


def _place(name: str, places: Mapping[str, str], modules: set[str]) -> str:
    above, inside = name.rpartition(".")[0], list[str]()
    while above and above not in places:
        above, _, word = above.rpartition(".")
        inside.insert(0, word)
    found = places.get(above, "")
    for word in inside:
        if f"{found}.{word}" not in modules:
            break
        found = f"{found}.{word}"
    return found


def _print(count: int, values: Any) -> bytes:
    return count.to_bytes(8, "little") + np.ascontiguousarray(values, np.float32).tobytes()


def _count(tensor: Written) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _values(tensor: Written) -> Any:
    """The first values of a tensor in a file, as float32."""
    from arch_maps.dtypes import NUMPY_DTYPES

    bits = np.array(tensor.bits().reshape(-1)[:_SEEN])
    return bits.view(NUMPY_DTYPES[tensor.dtype]).astype(np.float32)
