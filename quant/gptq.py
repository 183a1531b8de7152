"""GPTQ: rounding that makes up for the errors of earlier columns in later ones.

Frantar et al., arXiv 2210.17323, with act-order and static groups: columns are visited by
decreasing activation, while scales and biases are fixed before in the original column order, so
that the stored groups stay contiguous. Their grid is that of method "imatrix".
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from quant.moments import diagonal_blocks
from quant.recipe import QuantSpec
from quant.search import pack_codes, search_codes

DAMPING: Final = 0.01
"""Share of the mean diagonal added to the Hessian's."""
_BLOCK: Final = 128
_SLICE: Final = 1 << 24
"""Elements that are rounded at a time: they take about 40 bytes each, and tables have 10^9."""

Matrix = npt.NDArray[np.float64]
P = ParamSpec("P")
R = TypeVar("R")


def _on_one_thread(run: Callable[P, R]) -> Callable[P, R]:
    """``run`` with one BLAS thread: how many there are decides the order in which it adds up."""

    @wraps(run)
    def limited(*args: P.args, **named: P.kwargs) -> R:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1, user_api="blas"):
            return run(*args, **named)

    return limited


@_on_one_thread
def quantize_gptq(
    w: npt.NDArray[Any], spec: QuantSpec, hessian: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """Quantize (rows, cols) ``w`` for inputs with ``hessian`` = mean of x x^T (cols, cols).

    Returns the tensors of ``spec.output_tensors``. Raises NonFiniteError as quantize_rows does.
    """
    code = CODES[w.dtype]
    tensors = spec.output_tensors(w.shape, code)
    parts = {r: np.empty(shape, NUMPY_DTYPES[c]) for r, (c, shape) in tensors.items()}
    search_codes(w, spec, moments=diagonal_blocks(hessian, spec.group_size), out=parts)
    order, factor = inverse_factor(hessian)
    rows, columns = w.shape
    step = max(1, _SLICE // columns)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        own = {role: part[block] for role, part in parts.items()}
        scale, bias = _expanded(own, spec)
        wide = w[block].astype(np.float32)[:, order]
        codes = _rounded(wide, scale[:, order], bias[:, order], factor, spec)
        back = np.empty_like(codes)
        back[:, order] = codes
        pack_codes(back, spec, out=own["weight"])
    return parts


@_on_one_thread
def inverse_factor(
    hessian: npt.NDArray[Any], *, damping: float = DAMPING
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """The order of columns and U, upper, with U^T U = (H + damping)^-1 in that order.

    The damping grows tenfold until the matrix is positive definite. Columns that never saw an
    input count as independent.
    """
    diagonal = np.array(np.diagonal(hessian), np.float64)
    mean = float(diagonal.mean()) or 1.0
    order = np.argsort(-diagonal, kind="stable")
    h: Matrix = np.asarray(hessian, np.float64)[order]
    h = h[:, order]
    assert np.isfinite(h).all(), "the Hessian must be finite"
    diagonal = diagonal[order]
    diagonal += np.where(diagonal == 0, mean, 0.0)
    while True:
        h[np.diag_indices_from(h)] = diagonal + damping * mean
        try:
            # With P the reversal, P H P = L L^T gives H^-1 = U^T U for U = P L^-1 P.
            lower: Matrix = np.linalg.cholesky(h[::-1, ::-1]).astype(np.float64, copy=False)
            break
        except np.linalg.LinAlgError:
            damping *= 10
    del h  # wide layers have matrices of a gigabyte
    _invert_lower(lower)
    return order, np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _invert_lower(matrix: Matrix) -> None:
    """Invert a lower triangular matrix in place: its halves, then what is below both."""
    size = len(matrix)
    if size <= _BLOCK:
        matrix[:] = np.tril(np.linalg.inv(matrix))
        return
    half = size // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    below[:] = -(last @ (below @ first))


def values_of(parts: dict[str, npt.NDArray[Any]], spec: QuantSpec) -> npt.NDArray[np.float32]:
    """The (rows, cols) values that stored tensors stand for, in float32."""
    from quant.weights import dequantize_rows

    wide = dict(parts)
    if spec.mode == "affine":
        wide |= {role: parts[role].astype(np.float32) for role in ("scales", "biases")}
    return np.ascontiguousarray(dequantize_rows(wide, spec, "F32"), np.float32)


def _expanded(
    parts: dict[str, npt.NDArray[Any]], spec: QuantSpec
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scale and bias of every element as float32."""
    import ml_dtypes

    scales = parts["scales"]
    if spec.mode == "affine":
        scale, bias = scales.astype(np.float32), parts["biases"].astype(np.float32)
    else:
        if spec.mode == "nvfp4":
            scale = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        else:
            scale = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
        bias = np.zeros_like(scale)
    size = spec.group_size
    return np.repeat(scale, size, axis=1), np.repeat(bias, size, axis=1)


def _rounded(
    w: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    factor: npt.NDArray[np.float32],
    spec: QuantSpec,
) -> npt.NDArray[np.uint8]:
    """Codes of columns in the order given; block updates as in the paper's algorithm 1."""
    from quant import kernels_gptq

    element = {"affine": 0, "mxfp8": 2}.get(spec.mode, 1)
    kernel = kernels_gptq.round_block(element)
    w = np.ascontiguousarray(w)
    codes = np.empty(w.shape, np.uint8)
    levels = np.float32(2**spec.bits - 1)
    for start in range(0, w.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, w.shape[1]))
        values, scales, biases, u = (
            np.ascontiguousarray(part)
            for part in (w[:, block], scale[:, block], bias[:, block], factor[block, block])
        )
        found = np.empty(values.shape, np.uint8)
        errors = np.empty_like(values)
        kernel(values, scales, biases, levels, u, found, errors)
        codes[:, block] = found
        if block.stop < w.shape[1]:
            w[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes
