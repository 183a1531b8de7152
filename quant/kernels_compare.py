"""Compiled comparison of weights with what their codes stand for."""

from typing import Any

import numpy as np
import numpy.typing as npt

from quant.compiled import jit

Array = npt.NDArray[Any]


@jit
def compare_groups(w: Array, v: Array, middle: Array, alike: Array, size: Array) -> float:
    """Hold the groups of (rows, cols) float32 ``w`` against the values ``v`` of their codes.

    ``middle`` (rows, groups) float32 is the value in the middle of a group's codes. With both sides
    taken from there, ``alike`` becomes the cosine of ``w`` and ``v``, 1 where either is nothing,
    and ``size`` the sum of squares of ``w``. Returns the sum of (w - v)^2. Sums are in float64.
    """
    rows, columns = w.shape
    groups = middle.shape[1]
    width = columns // groups
    total = 0.0
    for row in range(rows):
        for index in range(groups):
            m = np.float64(middle[row, index])
            square_w = 0.0
            square_v = 0.0
            shared = 0.0
            for i in range(index * width, (index + 1) * width):
                a = np.float64(w[row, i]) - m
                b = np.float64(v[row, i]) - m
                total += (a - b) * (a - b)
                square_w += a * a
                square_v += b * b
                shared += a * b
            both = np.sqrt(square_w) * np.sqrt(square_v)
            alike[row, index] = shared / both if both > 0.0 else 1.0
            size[row, index] = square_w
    return total
