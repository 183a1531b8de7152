"""The one way kernels are compiled: without the GIL, without fast math, cached on disk."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., Any]

_PROBED: Final = frozenset({"scipy", "cffi"})
"""Packages that numba looks for when it starts, to support calls that no kernel here makes."""
_started = threading.Lock()


def jit(function: Function) -> Function:
    """Compile ``function`` on its first call; cached where a folder for that is writable.

    One thread, IEEE arithmetic in the order written, division by zero as in the hardware.
    """
    numba = _numba()
    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the folder of the source nor the user's cache is writable
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)


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
