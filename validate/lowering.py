"""From the primitives that MLX records of a computation to tensor expressions of the maps.

MLX exports what a function does to its arrays as a list of primitives with their parameters. A
loader that only moves and scales weights is then an expression for each parameter; whatever it
computes beyond that is ``Opaque``, with the primitive that stands in the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

import numpy as np

from arch_maps.ops import Affine, Constant, Expr, Shape, Source, evaluate, sources
from validate.moves import concat, permute, reshape, slice_axis, spread, take

_SCALARS: Final = "\0constant "
"""Starts the name of a leaf that stands for a constant array of the recorded function."""
_RESHAPES: Final = frozenset({"Reshape", "Unflatten", "Flatten", "ExpandDims", "Squeeze"})
_UNCHANGED: Final = frozenset({"AsType", "Full", "Contiguous", "Copy", "StopGradient"})
"""Primitives whose result holds the values of their first input, up to the storage type."""


_UNFILLED: Final = "no tensor of the release fills it"


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that the rule language cannot say, and the primitive that made it so."""

    shape: Shape
    why: str


Value = Expr | Opaque


@dataclass(slots=True)
class Recorder:
    """The callback of ``mlx.core.export_function``: collects what it is told."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[tuple[str, Shape, str]] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    primitives: dict[str, tuple[Mapping[str, Any], int]] = field(default_factory=dict)
    """By the name of the value that it makes: the primitive, and which of its outputs that is."""

    def __call__(self, entry: Mapping[str, Any]) -> None:
        """Take one record of the export."""
        match entry["type"]:
            case "inputs":
                self.inputs = [name for name, _, _ in entry["inputs"]]
            case "outputs":
                self.outputs = [(n, tuple(shape), _code(d)) for n, shape, d in entry["outputs"]]
            case "constants":
                self.constants = dict(entry["constants"])
            case "primitive":
                for index, (name, _, _) in enumerate(entry["outputs"]):
                    self.primitives[name] = (entry, index)


class Lowering:
    """Values of a recorded function as expressions over its named inputs."""

    def __init__(self, recorded: Recorder, leaves: Sequence[Source]) -> None:
        """``leaves`` are the inputs of the function, in order."""
        self._recorded = recorded
        self._known: dict[str, Value] = dict(zip(recorded.inputs, leaves, strict=True))

    def value(self, name: str) -> Value:
        """The value called ``name``; deep graphs are walked without recursion."""
        waiting = [name]
        while waiting:
            top = waiting[-1]
            if top in self._known:
                waiting.pop()
            elif top in self._recorded.constants:
                self._known[top] = self._constant(top)
            else:
                entry, _ = self._recorded.primitives[top]
                open_inputs = [n for n, _, _ in entry["inputs"] if n not in self._known]
                if open_inputs:
                    waiting += open_inputs
                else:
                    self._apply(entry)
        return self._known[name]

    def _constant(self, name: str) -> Value:
        array = _plain(self._recorded.constants[name])
        return _fixed(array) or Source(_SCALARS + name, array.shape)

    def _apply(self, entry: Mapping[str, Any]) -> None:
        inputs = [self._known[name] for name, _, _ in entry["inputs"]]
        for index, (name, shape, _) in enumerate(entry["outputs"]):
            shape = tuple(shape)
            opaque = next((one for one in inputs if isinstance(one, Opaque)), None)
            if opaque is not None:
                self._known[name] = Opaque(shape, opaque.why)
                continue
            exprs = [one for one in inputs if not isinstance(one, Opaque)]
            result = self._lower(entry, index, exprs, shape)
            assert result.shape == shape, (entry["name"], result.shape, shape)
            self._known[name] = result

    def _lower(self, entry: Mapping[str, Any], index: int, x: list[Expr], shape: Shape) -> Value:
        name, arguments = entry["name"], entry["arguments"]
        if name in _RESHAPES:
            return reshape(x[0], shape)
        if name in _UNCHANGED:
            return x[0]
        if name in _ARITHMETIC:
            return _affine(name, x, shape)
        match name:
            case "Transpose":
                return permute(x[0], tuple(arguments[0]))
            case "Slice":
                return _sliced(x[0], *arguments)
            case "Split":
                axis = arguments[1] % len(x[0].shape)
                edges = [0, *arguments[0], x[0].shape[axis]]
                return slice_axis(x[0], axis, edges[index], edges[index + 1])
            case "Concatenate":
                return concat(x, arguments[0] % len(shape))
            case "Broadcast":
                return spread(x[0], shape) or Opaque(shape, "it repeats a tensor many times")
            case "Arange":
                return self._table(np.arange(*arguments), shape)
            case "Gather":
                return self._gather(x, arguments, shape)
        if name.startswith("Random"):
            return Opaque(shape, _UNFILLED)
        return Opaque(shape, f"it computes {name}")

    def _table(self, array: np.ndarray, shape: Shape) -> Expr:
        name = f"table {len(self._recorded.constants)}"
        self._recorded.constants[name] = array.reshape(shape)
        return Source(_SCALARS + name, shape)

    def _gather(self, x: list[Expr], arguments: Any, shape: Shape) -> Value:
        axes, sizes = arguments
        whole = [s for i, s in enumerate(x[0].shape) if i not in axes]
        kept = [s for i, s in enumerate(sizes) if i not in axes]
        indices = self._numbers(x[1]) if len(x) == 2 else None
        if indices is None or len(axes) != 1 or whole != kept or indices.ndim > 1:
            return Opaque(shape, "it picks elements in a way that is no slice")
        taken = take(x[0], axes[0], [int(i) for i in indices.reshape(-1)])
        if taken is None:
            return Opaque(shape, "it reorders elements without a pattern")
        order = (axes[0], *(i for i in range(len(x[0].shape)) if i != axes[0]))
        return reshape(permute(taken, order), shape)

    def _numbers(self, expr: Expr) -> np.ndarray | None:
        """The values of an expression over constants alone."""
        leaves = sources(expr)
        if not all(leaf.name.startswith(_SCALARS) for leaf in leaves):
            return None
        return evaluate(expr, _Constants(self._recorded.constants)).reshape(expr.shape)


def settled(value: Value) -> Value:
    """The value as a rule may hold it: no tables that the function brings along itself."""
    if not isinstance(value, Opaque) and any(
        leaf.name.startswith(_SCALARS) for leaf in sources(value)
    ):
        return Opaque(value.shape, "it fills in a table of its own")
    if isinstance(value, Constant) and math.isnan(value.value):
        return Opaque(value.shape, _UNFILLED)
    return value


@dataclass(frozen=True, slots=True)
class _Constants:
    arrays: Mapping[str, Any]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a constant."""
        array = _plain(self.arrays[name.removeprefix(_SCALARS)])
        return array[start:stop] if array.shape else array


def _plain(array: Any) -> np.ndarray:
    """A numpy array of an MLX one; numpy knows no bfloat16."""
    return np.array(_float32(array) if _code(array.dtype) == "bfloat16" else array)


def _float32(array: Any) -> Any:
    mx: Any = import_module("mlx.core")
    return array.astype(mx.float32)


def _fixed(array: np.ndarray) -> Constant | None:
    """A constant of one value, where that is all it holds."""
    flat = array.reshape(-1)
    if (
        flat.size
        and array.dtype != np.bool_
        and np.array_equal(
            flat, np.broadcast_to(flat[0], flat.shape), equal_nan=array.dtype.kind == "f"
        )
    ):
        return Constant(array.shape, float(flat[0]))
    return None


def _sliced(x: Expr, starts: Any, stops: Any, steps: Any) -> Value:
    shape = x.shape
    for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        if step == 1:
            x = slice_axis(x, axis, start, stop)
            continue
        taken = take(x, axis, list(_stepped(start, stop, step, shape[axis])))
        if taken is None:
            return Opaque(x.shape, "it takes elements in steps that no reshape can say")
        x = taken
    return x


def _stepped(start: int, stop: int, step: int, size: int) -> Iterator[int]:
    """Indices as MLX normalises them: a negative step ends at ``-size - 1`` for the very start."""
    if step < 0:
        stop = stop + size if stop < 0 else stop
    yield from range(start, stop, step)


_ARITHMETIC: Final[dict[str, Callable[[float], tuple[float, float]]]] = {
    "Add": lambda c: (1.0, c),
    "Subtract": lambda c: (1.0, -c),
    "Multiply": lambda c: (c, 0.0),
    "Divide": lambda c: (1.0 / c, 0.0),
    "Negative": lambda _: (-1.0, 0.0),
}
"""Scale and offset of ``x op c``."""


def _affine(name: str, x: list[Expr], shape: Shape) -> Value:
    if name == "Negative":
        x = [x[0], Constant(shape, 0.0)]
    elif isinstance(x[0], Constant) and name in ("Add", "Multiply"):
        x = [x[1], x[0]]
    if not isinstance(x[1], Constant) or (name == "Divide" and x[1].value == 0):
        return Opaque(shape, f"it computes {name} of two tensors")
    scale, offset = _ARITHMETIC[name](x[1].value)
    if isinstance(x[0], Constant):
        return Constant(shape, x[0].value * scale + offset)
    if isinstance(x[0], Affine):
        inner = x[0]
        return Affine(inner.x, inner.scale * scale, inner.offset * scale + offset)
    return x[0] if (scale, offset) == (1.0, 0.0) else Affine(x[0], scale, offset)


def _code(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]
