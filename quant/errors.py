"""Errors that carry the position of the element that caused them."""

from typing import Any, Self

import numpy.typing as npt


class ElementError(ValueError):
    """A weight element cannot be converted: ``row`` counts all leading axes flattened."""

    def __init__(self, *, row: int, column: int, what: str) -> None:
        super().__init__(f"{what} at row {row}, column {column}")
        self.row = row
        self.column = column

    @classmethod
    def at(cls, array: npt.NDArray[Any], index: int, what: str) -> Self:
        """The error for flat ``index`` of ``array``; rows are everything but the last axis."""
        row, column = divmod(index, array.shape[-1] if array.ndim else 1)
        return cls(row=row, column=column, what=what)


class NonFiniteError(ElementError):
    """A weight holds NaN or an infinity, which no quantized format can express."""


class CastOverflowError(ElementError):
    """A finite value lies outside the range of the type it is cast to."""


class CalibrationError(ValueError):
    """Calibration cannot be done as asked; the message says what to change."""
