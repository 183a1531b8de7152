"""The one way kernels are compiled: without the GIL, without fast math, cached on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., Any]


def jit(function: Function) -> Function:
    """Compile ``function`` on its first call; cached where a folder for that is writable.

    One thread, IEEE arithmetic in the order written, division by zero as in the hardware.
    """
    import numba

    try:
        compiled = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the folder of the source nor the user's cache is writable
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)
