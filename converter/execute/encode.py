"""From the rows of a parameter to the bytes that store them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arch_maps.dtypes import CODES, FLOAT_CODES
from arch_maps.ops import RowReader, evaluate, row_count
from converter.calibrated import Calibrated
from converter.errors import ConvertError
from converter.plan.model import Output, StoredTensor
from quant.errors import CastOverflowError, ElementError, NonFiniteError
from quant.recipe import CALIBRATED


class BadValueError(ConvertError):
    """A weight holds a value that cannot be stored; the message names the tensor."""

    exit_code = 3


def encode(
    out: Output,
    rows: np.ndarray,
    start: int,
    *,
    checked: bool = False,
    calibrated: Calibrated | None = None,
) -> Iterator[tuple[StoredTensor, int, np.ndarray]]:
    """Yield (tensor, absolute byte offset, array) for rows from ``start`` of a parameter.

    ``checked`` says that the rows are known to be finite; ``calibrated`` holds what the
    calibrated methods need. Raises BadValueError.
    """
    from quant.floats import cast, check_finite
    from quant.weights import quantize_rows

    try:
        rows = np.ascontiguousarray(rows)
        if CODES[rows.dtype] in FLOAT_CODES:
            if not checked and out.quant is None:
                check_finite(rows)
            rows = cast(rows, out.dtype)
        elif out.dtype in ("I32", "I64"):
            rows = _integers(out, rows)
        parts = {"": rows}
        if out.quant is not None:
            made = moments = None
            spec = out.quant
            if calibrated is not None:
                made = calibrated.parts(out, start, start + len(rows))
                moments = calibrated.moments(out, start, start + len(rows))
            if moments is None and spec.method in CALIBRATED:  # what no statistics cover
                spec = replace(spec, method="search")
            parts = made or quantize_rows(rows, spec, moments=moments)
    except ElementError as error:
        raise BadValueError(_explain(out, error, rows, start)) from error
    for role, array in parts.items():
        tensor = out.stored[role]
        row_bytes = tensor.nbytes // row_count(tensor.shape)
        _within(tensor, array, row_bytes * row_count(rows.shape))
        yield tensor, tensor.start + start * row_bytes, array


def _within(tensor: StoredTensor, array: np.ndarray, planned: int) -> None:
    """What is wider than planned would be written over its neighbour."""
    assert array.nbytes == planned, f"{tensor.name}: {array.nbytes} bytes where {planned} are due"


def repack(
    out: Output, reader: RowReader, start: int, stop: int
) -> Iterator[tuple[StoredTensor, int, np.ndarray]]:
    """Yield the same for rows ``[start, stop)`` that keep the codes of their source."""
    assert out.repacked is not None
    for role, expr in out.repacked.items():
        tensor = out.stored[role]
        row_bytes = tensor.nbytes // row_count(tensor.shape)
        array = np.ascontiguousarray(evaluate(expr, reader, start, stop))
        yield tensor, tensor.start + start * row_bytes, array


def _integers(out: Output, rows: np.ndarray) -> np.ndarray:
    """The same integers in the stored width."""
    narrow = rows.astype(np.int32 if out.dtype == "I32" else np.int64)
    if not np.array_equal(narrow, rows):
        raise BadValueError(f"out of range: {out.rule.target} holds integers beyond int32")
    return narrow


def _explain(out: Output, error: ElementError, rows: np.ndarray, start: int) -> str:
    value = rows.reshape(-1)[error.row * (rows.shape[-1] if rows.ndim else 1) + error.column]
    row, column = start + error.column, 0  # of a vector, each element is a row
    if rows.ndim > 1:
        per_row = math.prod(rows.shape[1:-1])
        row, column = start + error.row // per_row, error.column
    where = f"{out.rule.target}, row {row}, column {column}"
    if isinstance(error, NonFiniteError):
        return f"not finite: {where} is NaN or infinite; the release is damaged or unfinished"
    assert isinstance(error, CastOverflowError)
    return f"out of range: {where} is {value}, too large for {out.dtype}; use another --dtype"
