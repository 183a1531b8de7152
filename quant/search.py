"""Searched quantization: scales and biases with the least weighted squared error."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES
from quant.errors import NonFiniteError
from quant.floats import KINDS, as_bits, reject_group
from quant.packing import pack_rows
from quant.recipe import QuantSpec

FORMATS: Final = {"mxfp4": 0, "mxfp8": 1, "nvfp4": 2}
_CLIPS: Final = np.array([0.0, 1.0], np.float32)
"""Steps of the range that the starting grids leave out; more of them gain under 1 % of error."""
_SLICE: Final = 1 << 17


def quantize_searched(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    *,
    weights: npt.NDArray[np.float32] | None,
    out: dict[str, npt.NDArray[Any]],
) -> None:
    """Fill ``out`` from (rows, cols) ``w``; ``weights`` (cols,) weigh the squared errors.

    Without weights all columns count alike. The weighted error of no group exceeds that of
    method "rtn"; rows are independent.
    """
    rows, columns = w.shape
    step = max(1, _SLICE // columns)
    for row in range(0, rows, step):
        block = slice(row, min(row + step, rows))
        parts = {role: part[block] for role, part in out.items()}
        codes = search_codes(w[block], spec, weights=weights, out=parts, first_row=row)
        pack_codes(codes, spec, out=parts["weight"])


def search_codes(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    *,
    weights: npt.NDArray[np.float32] | None,
    out: dict[str, npt.NDArray[Any]],
    first_row: int = 0,
) -> npt.NDArray[np.uint8]:
    """Codes (rows, cols), a byte each; fills only the scales and biases of ``out``."""
    from quant import kernels_search

    kind = KINDS[CODES[w.dtype]]
    columns = w.shape[1]
    importance = np.ones(columns, np.float32) if weights is None else normalized(weights)
    codes = np.empty(w.shape, np.uint8)
    if spec.mode == "affine":
        index = kernels_search.affine_search(kind, spec.group_size)(
            as_bits(w),
            importance,
            np.float32(2**spec.bits - 1),
            _CLIPS,
            codes,
            as_bits(out["scales"]),
            as_bits(out["biases"]),
        )
    else:
        kernel = kernels_search.microscaled_search(kind, FORMATS[spec.mode])
        index = kernel(as_bits(w), importance, codes, out["scales"])
    if index >= 0:
        found = reject_group(w, index, spec.group_size)
        raise NonFiniteError(
            row=found.row + first_row, column=found.column, what=str(found).partition(" at row ")[0]
        )
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


def normalized(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weights with mean 1, none below a millionth: dead columns still decide between equals."""
    assert np.isfinite(weights).all(), "column weights must be finite"
    mean = float(weights.mean(dtype=np.float64))
    if mean <= 0:
        return np.ones(weights.shape, np.float32)
    floor: npt.NDArray[np.float32] = np.maximum(weights / mean, 1e-6).astype(np.float32)
    return floor
