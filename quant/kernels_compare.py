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
    taken from there, ``alike`` becomes the cosine of ``w`` and ``v``, and ``size`` the sum of
    squares of ``w``. Where one side is nothing ``alike`` is 1, but -1 where the values are nothing
    and the weights are not, being further from the middle than half of their own size. Returns the
    sum of (w - v)^2. Sums are in float64.
    """
    rows, columns = w.shape
    groups = middle.shape[1]
    width = columns // groups
    total = 0.0
    for row in range(rows):
        for index in range(groups):
            m = np.float64(middle[row, index])
            whole = 0.0
            square_w = 0.0
            square_v = 0.0
            shared = 0.0
            for i in range(index * width, (index + 1) * width):
                a = np.float64(w[row, i]) - m
                b = np.float64(v[row, i]) - m
                whole += np.float64(w[row, i]) * np.float64(w[row, i])
                total += (a - b) * (a - b)
                square_w += a * a
                square_v += b * b
                shared += a * b
            both = np.sqrt(square_w) * np.sqrt(square_v)
            if both > 0.0:
                alike[row, index] = shared / both
            elif square_v == 0.0 and square_w > 0.25 * whole:
                alike[row, index] = -1.0
            else:
                alike[row, index] = 1.0
            size[row, index] = square_w
    return total
