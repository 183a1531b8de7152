"""Exact casts between float types, and the search for NaN and infinity, on whole arrays."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES, FLOAT_CODES, NUMPY_DTYPES
from quant.errors import CastOverflowError, NonFiniteError

KINDS: Final[dict[str, int]] = {"F32": 0, "BF16": 1, "F16": 2}
"""Float types the compiled kernels read and write, by the number they know them by."""


_EXPONENTS: Final = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00, "F64": 0x7FF << 52}
"""Bits that are all set in NaN and the infinities only."""
_BLOCK: Final = 1 << 17


def as_bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers of the same width."""
    return array.view(f"u{array.dtype.itemsize}")


def refuse_read_only(array: npt.NDArray[Any], name: str) -> None:
    """Raise ValueError for an array that is to be filled and may not be: kernels do not look."""
    if not array.flags.writeable:
        raise ValueError(f"{name}: the array is read-only, and results are to be written to it")


def is_finite(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which elements are neither NaN nor infinite."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        finite: npt.NDArray[np.bool_] = np.isfinite(array)
    return finite


def reject_group(array: npt.NDArray[Any], start: int, size: int) -> NonFiniteError:
    """The error for the ``size`` elements of ``array`` from flat ``start`` that a kernel rejects.

    Names the first NaN or infinity, or the group's start where each element is finite but the
    group's range is not.
    """
    bad = ~is_finite(array.reshape(-1)[start : start + size])
    if not bad.any():
        return NonFiniteError.at(array, start, "a group's range overflows float32")
    return NonFiniteError.at(array, start + int(bad.argmax()), "NaN or infinity")


def check_finite(array: npt.NDArray[Any]) -> None:
    """Raise NonFiniteError at the first NaN or infinity; types without either pass.

    Plain numpy in blocks that stay in the cache: as fast as memory, and a conversion that only
    copies need not load a compiler.
    """
    code = CODES[array.dtype]
    mask = _EXPONENTS.get(code)
    if mask is None:
        if code.startswith("F"):
            bad = ~np.isfinite(array).reshape(-1)
            if bad.any():
                raise NonFiniteError.at(array, int(bad.argmax()), "NaN or infinity")
        return
    bits = as_bits(np.ascontiguousarray(array).reshape(-1))
    limit = bits.dtype.type(mask)
    for start in range(0, bits.size, _BLOCK):
        exponents = bits[start : start + _BLOCK] & limit
        if exponents.max() == limit:
            raise NonFiniteError.at(array, start + int(exponents.argmax()), "NaN or infinity")


def cast(
    array: npt.NDArray[Any], dtype_code: str, *, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """``array`` in another float type, rounded half to even; F64 narrows through F32.

    The results are those of torch and mlx. NaN and infinities stay what they are; a finite value
    outside the range of the new type raises CastOverflowError. Fills ``out``, C-contiguous and
    of the same shape, where given, and raises ValueError where that is read-only; else returns
    ``array`` itself when it has the type already.
    """
    source = CODES[array.dtype]
    assert {source, dtype_code} <= FLOAT_CODES, f"{source} to {dtype_code} is no float cast"
    if source == dtype_code and out is None:
        return array
    if out is None:
        out = np.empty(array.shape, NUMPY_DTYPES[dtype_code])
    assert out.dtype == NUMPY_DTYPES[dtype_code], f"out is {out.dtype}, not {dtype_code}"
    assert out.shape == array.shape, f"out is {out.shape}, not {array.shape}"
    refuse_read_only(out, "out")
    start, size = -1, array.size
    if source == dtype_code:
        out[...] = array
    elif source in KINDS and dtype_code in KINDS:
        from quant import kernels

        flat = np.ascontiguousarray(array).reshape(-1)
        kernel = kernels.casting(KINDS[source], KINDS[dtype_code])
        start, size = int(kernel(as_bits(flat), as_bits(out.reshape(-1)))), kernels.CHUNK
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            through = array.astype(np.float32) if source == "F64" else array
            out[...] = through.astype(out.dtype)
        if (is_finite(array) & ~is_finite(out)).any():
            start = 0
    if start >= 0:
        span = slice(start, start + size)
        lost = is_finite(array.reshape(-1)[span]) & ~is_finite(out.reshape(-1)[span])
        index = start + int(lost.argmax())
        value = array.reshape(-1)[index]
        raise CastOverflowError.at(array, index, f"{value} is outside the range of {dtype_code}")
    return out
