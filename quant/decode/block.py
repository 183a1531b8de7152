"""Rows of a quantized matrix as codes, table, zeros and scales: decoded, or repacked for MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import NUMPY_DTYPES
from quant.errors import ElementError
from quant.floats import KINDS, as_bits, cast, is_finite
from quant.packing import pack_rows
from quant.recipe import QuantSpec

Array = npt.NDArray[Any]
_NONE: Final = np.empty((0, 0), np.float32)


class CodingError(ValueError):
    """Quantized bytes hold what their format does not allow; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of a matrix (rows, cols): ``(table[code] - zero) * scale + minimum``, in float32.

    ``group`` columns share a scale, the last group may be shorter; ``index`` names the group of
    each column instead, where they do not lie together. ``zeros`` are in units of the table.
    """

    columns: int
    table: npt.NDArray[np.float32]
    """The value of each code; (2**bits,)."""
    scales: npt.NDArray[np.float32]
    """(rows, groups)"""
    group: int
    codes: npt.NDArray[np.uint8] | None = None
    """(rows, cols), None where only scales were asked for."""
    zeros: npt.NDArray[np.float32] | None = None
    minima: npt.NDArray[np.float32] | None = None
    index: npt.NDArray[np.int32] | None = None

    def check(self) -> None:
        """Raise CodingError at the first scale, zero or minimum that is NaN or infinite."""
        named = (("scale", self.scales), ("zero point", self.zeros), ("minimum", self.minima))
        for what, part in named:
            if part is None:
                continue
            bad = ~is_finite(part)
            if bad.any():
                row, group = np.unravel_index(int(bad.argmax()), part.shape)
                raise CodingError(f"the {what} of row {row}, group {group} is NaN or infinite")

    def values(self, dtype_code: str) -> Array:
        """The rows as plain numbers of type F32, F16 or BF16; raises CodingError."""
        from quant.decode import kernels

        self.check()
        assert self.codes is not None, "codes were not asked for"
        out = np.empty(self.codes.shape, NUMPY_DTYPES[dtype_code])
        kind = KINDS[dtype_code]
        zeros = _NONE if self.zeros is None else self.zeros
        if self.index is not None:
            assert self.minima is None
            kernel = kernels.indexed_values(kind)
            kernel(self.codes, self.table, self.scales, zeros, self.index, as_bits(out))
            return out
        minima = _NONE if self.minima is None else self.minima
        kernel = kernels.grouped_values(kind)
        kernel(self.codes, self.table, self.scales, zeros, minima, self.group, as_bits(out))
        return out

    def repacked(self, spec: QuantSpec, dtype_code: str, role: str) -> Array:
        """The stored tensor ``role`` of MLX for these rows, codes unchanged; raises CodingError.

        Affine scales and biases are rounded to ``dtype_code``; ``lossless`` says whether that
        loses anything.
        """
        self.check()
        if role == "weight":
            assert self.codes is not None, "codes were not asked for"
            if spec.mode == "mxfp8" and (bad := (self.codes & 0x7F) == 0x7F).any():
                row, column = np.unravel_index(int(bad.argmax()), self.codes.shape)
                raise CodingError(f"row {row}, column {column} is NaN")
            return pack_rows(np.ascontiguousarray(self.codes), spec.bits)
        assert self.group % spec.group_size == 0, (self.group, spec)
        if spec.mode != "affine":
            part: Array = exponents(self.scales)
        else:
            try:
                part = cast(self.scales if role == "scales" else self._biases(), dtype_code)
            except ElementError as error:
                raise CodingError(f"a group's {role} does not fit {dtype_code}: {error}") from error
        finer = np.repeat(part, self.group // spec.group_size, axis=1)
        return np.ascontiguousarray(finer[:, : self.columns // spec.group_size])

    def _biases(self) -> npt.NDArray[np.float32]:
        """What code 0 stands for."""
        zeros = np.float32(0) if self.zeros is None else self.zeros
        with np.errstate(over="ignore"):
            biases: npt.NDArray[np.float32] = (self.table[0] - zeros) * self.scales
        return biases if self.minima is None else biases + self.minima


def exponents(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """E8M0 bytes of ``scales``; raises CodingError where one is not a power of two."""
    mantissa, power = np.frexp(scales)
    bad = (mantissa != 0.5) | (power < -126) | (power > 128)
    if bad.any():
        row, group = np.unravel_index(int(bad.argmax()), scales.shape)
        raise CodingError(
            f"the scale of row {row}, group {group} is {scales[row, group]}, not a power of two"
        )
    return (power + 126).astype(np.uint8)
