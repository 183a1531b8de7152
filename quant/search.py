"""Searched quantization: scales, biases and codes with the least squared error.

Without data ("search") all columns of a group count alike. With the second moments of the inputs
that a group multiplies ("imatrix") the error counts as it reaches the output, correlations between
the columns of the group included.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES
from quant.errors import NonFiniteError
from quant.floats import KINDS, as_bits, reject_group
from quant.lattice import keep_codes
from quant.packing import pack_rows
from quant.recipe import QuantSpec

FORMATS: Final = {"mxfp4": 0, "mxfp8": 1, "nvfp4": 2}
DAMPING: Final = 0.01
"""Share of the mean diagonal that is added to the diagonal of moments."""
_CLIPS: Final = np.array([0.0, 1.0], np.float32)
"""Steps of the range that the starting grids leave out; more of them gain under 1 % of error."""
_SLICE: Final = 1 << 17

Moments = npt.NDArray[np.float32]


def quantize_searched(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    *,
    moments: Moments | None,
    out: dict[str, npt.NDArray[Any]],
) -> None:
    """Fill ``out`` from (rows, cols) ``w``; rows are independent.

    ``moments`` (cols / group, group, group) are second moments of the inputs, up to a factor.
    Without them no group's error exceeds that of method "rtn".
    """
    from quant.kernels_affine import LANES

    rows, columns = w.shape
    step = LANES * max(1, _SLICE // (LANES * columns))
    moments = None if moments is None else damped(moments)
    for row in range(0, rows, step):
        block = slice(row, min(row + step, rows))
        parts = {role: part[block] for role, part in out.items()}
        codes = _search_codes(w[block], spec, moments, out=parts, first_row=row)
        pack_codes(codes, spec, out=parts["weight"])


def search_codes(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    *,
    moments: Moments | None,
    out: dict[str, npt.NDArray[Any]],
) -> npt.NDArray[np.uint8]:
    """Codes (rows, cols), a byte each; fills only the scales and biases of ``out``."""
    return _search_codes(w, spec, None if moments is None else damped(moments), out=out)


def _search_codes(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    moments: Moments | None,
    *,
    out: dict[str, npt.NDArray[Any]],
    first_row: int = 0,
) -> npt.NDArray[np.uint8]:
    from quant import kernels_affine, kernels_search

    kind = KINDS[CODES[w.dtype]]
    size = spec.group_size
    importance = np.ones(w.shape[1], np.float32)
    if moments is not None:
        importance = np.ascontiguousarray(moments.diagonal(axis1=1, axis2=2)).reshape(-1)
    codes = np.empty(w.shape, np.uint8)
    bits, scales = as_bits(w), out["scales"]
    levels = np.float32(2**spec.bits - 1)
    if spec.mode == "affine":
        scales, biases = as_bits(scales), as_bits(out["biases"])
        edges = np.empty(scales.shape, bits.dtype)
        kernel = kernels_affine.affine_search(kind, size)
        given = (bits, importance, levels, _CLIPS, moments is None)
        index = kernel(*given, codes, scales, biases, edges)
    else:
        kernel = kernels_search.microscaled_search(kind, FORMATS[spec.mode])
        index = kernel(bits, importance, codes, scales)
    if index >= 0:
        found = reject_group(w, index, size)
        raise NonFiniteError(
            row=found.row + first_row, column=found.column, what=str(found).partition(" at row ")[0]
        )
    if moments is None:
        if spec.mode == "affine":
            keep_codes(bits, spec, kind, edges=edges, codes=codes, scales=scales, biases=biases)
        return codes
    if spec.mode == "affine":
        from quant import kernels_moments

        descent = kernels_moments.affine_descent(kind, size)
        descent(bits, moments, levels, codes, scales, biases)
    else:
        from quant import kernels_moments_microscaled

        descent = kernels_moments_microscaled.microscaled_descent(kind, FORMATS[spec.mode])
        descent(bits, moments, codes, scales)
    return codes


def pack_codes(
    codes: npt.NDArray[np.uint8], spec: QuantSpec, *, out: npt.NDArray[np.uint32]
) -> None:
    """Pack (rows, cols) codes into ``out``; columns in 16s, as nvfp4 allows."""
    odd = codes.shape[1] % 32
    if not odd:
        pack_rows(codes, spec.bits, out=out)
        return
    padded = np.pad(codes, ((0, 0), (0, 32 - odd)))
    out[:] = pack_rows(padded, spec.bits)[:, : out.shape[1]]


def damped(moments: Moments) -> Moments | None:
    """Moments with a mean diagonal of 1 and ``DAMPING`` on it; None where nothing was seen.

    What is added keeps columns apart that never saw an input.
    """
    assert np.isfinite(moments).all(), "moments must be finite"
    mean = float(moments.diagonal(axis1=1, axis2=2).mean(dtype=np.float64))
    if mean <= 0:
        return None
    size = moments.shape[-1]
    scaled = np.divide(moments, np.float32(mean), order="C", dtype=np.float32)
    scaled.reshape(-1, size * size)[:, :: size + 1] += np.float32(DAMPING)
    return scaled
