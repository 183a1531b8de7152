"""The one way kernels are compiled: without the GIL, without fast math, cached on disk.

Numba compiles a kernel once for a machine. What it made is kept as an object file and bound by
llvmlite alone: numba itself takes longer to start than a gigabyte takes to quantize, and is not
imported where all kernels are found.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Final, TypeVar, cast

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., Any]

_PROBED: Final = frozenset({"scipy", "cffi"})
"""Packages that numba looks for when it starts, to support calls that no kernel here makes."""
_SCALARS: Final[dict[str, Any]] = {
    "i8": ctypes.c_int64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
    "b1": ctypes.c_bool,
}
"""Numbers that go in and out, by numpy's names."""
_started = threading.RLock()


class Compiled:
    """A function in numba's Python, compiled for the types of the arguments it is called with.

    Arguments are C-contiguous arrays, ints, bools and np.float32; it returns a number or None. It
    makes no arrays: memory comes from the caller. Another such function may call it and is then
    compiled with it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Nothing is compiled before the first call."""
        functools.update_wrapper(self, function)
        self.function = cast(FunctionType, function)
        self._bound: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run in the calling thread, without the GIL."""
        flat: list[Any] = []
        key: list[Any] = []
        for value in arguments:
            if isinstance(value, np.ndarray):
                flags = value.flags
                usable = flags.c_contiguous and flags.aligned and value.dtype.isnative
                assert usable, f"{self.function.__qualname__}: takes contiguous, aligned arrays"
                key += (value.dtype.num, value.ndim)
                address = value.__array_interface__["data"][0]
                flat += (None, None, value.size, value.itemsize, address)
                flat += value.shape
                flat += value.strides
            else:
                key.append(type(value))
                flat.append(value)
        bound = self._bound.get(tuple(key))
        if bound is None:
            with _started:
                bound = self._bound.get(tuple(key)) or self._bind(arguments)
                self._bound[tuple(key)] = bound
        return bound(*flat)

    @functools.cached_property
    def dispatcher(self) -> Any:
        """Numba's own view of the function."""
        return _numba().njit(**OPTIONS)(self.function)

    @property
    def _numba_type_(self) -> Any:
        """How numba types this where another kernel mentions it."""
        return self.dispatcher._numba_type_

    def _bind(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        from quant import objects

        types = tuple(map(_type_of, arguments))
        found = objects.find(self, types, make=lambda: _compile(self, types))
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *_parameters(types)
        )
        native = prototype(found.address)
        place = _SCALARS[found.returns or "i8"]

        def bound(*flat: Any) -> Any:
            result, error = place(), ctypes.c_void_p()
            status = native(ctypes.addressof(result), ctypes.addressof(error), *flat)
            assert status in (0, _NONE), f"{self.function.__qualname__}: status {status}"
            return result.value if found.returns else None

        return bound


OPTIONS: Final = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
"""Bare machine code: no Python objects, and memory only from the caller."""
_NONE: Final = -2
"""The status with which numba's functions return None."""


def jit(function: Function) -> Function:
    """``function`` as a kernel, or as a part of kernels: see Compiled.

    One thread, IEEE arithmetic in the order written, division by zero as in the hardware.
    """
    return cast(Function, Compiled(function))


def _type_of(value: Any) -> str:
    """Letter and size of a scalar's type; of an array's elements, with its dimensions."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str[1:]}:{value.ndim}"
    return "f4" if isinstance(value, np.float32) else "i8"


def _parameters(types: Sequence[str]) -> Iterator[Any]:
    """What numba's native functions take: an array as its owner (two words), size and strides.

    numba.readthedocs.io/en/stable/developer/numba-runtime.html and the model of its array type.
    """
    for name in types:
        if ":" in name:
            dimensions = int(name.partition(":")[2])
            yield from (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_ssize_t)
            yield ctypes.c_void_p
            yield from [ctypes.c_ssize_t] * (2 * dimensions)
        else:
            yield _SCALARS[name]


def _compile(kernel: Compiled, types: Sequence[str]) -> tuple[str, str, str]:
    """LLVM assembly, the symbol in it, and the type of number that it returns, or nothing."""
    from_dtype = _numba().from_dtype
    from numba.core import types as nb

    signature = tuple(
        nb.Array(from_dtype(np.dtype(name[: name.index(":")])), int(name[-1]), "C")
        if ":" in name
        else {"f4": nb.float32, "i8": nb.int64}[name]
        for name in types
    )
    kernel.dispatcher.compile(signature)
    found = kernel.dispatcher.overloads[signature]
    returns = {
        nb.none: "",
        nb.boolean: "b1",
        nb.int64: "i8",
        nb.float32: "f4",
        nb.float64: "f8",
    }
    returned = returns[found.signature.return_type]
    return found.library.get_llvm_str(), found.fndesc.llvm_func_name, returned


def _numba() -> Any:
    """Numba, started without the packages that it only probes for: they take longer than it."""
    with _started:
        if "numba" not in sys.modules:
            with _hidden(_PROBED):
                from numba.core.registry import cpu_target

                cpu_target.typing_context.refresh()
                cpu_target.target_context.refresh()
        import numba
    return numba


class _Hidden:
    """A finder in front of all others that knows of no such package, for one thread alone."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ImportError for the hidden names; leave every other one to the next finder."""
        if name in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)


@contextmanager
def _hidden(names: frozenset[str]) -> Iterator[None]:
    finder = cast(Any, _Hidden(names))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
