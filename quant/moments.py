"""Second moments of a layer's inputs, kept in blocks along the diagonal.

A group of a row multiplies only its own columns, so a search within groups needs the moments of
columns that share a group: blocks of the widest group in use hold those of every narrower one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def diagonal_blocks(matrix: Array, size: int) -> npt.NDArray[np.float32]:
    """The (count, size, size) blocks on the diagonal of a (cols, cols) matrix."""
    count = len(matrix) // size
    assert count * size == len(matrix), f"{len(matrix)} columns do not divide into {size}"
    view = matrix.reshape(count, size, count, size)
    at = np.arange(count)
    return np.ascontiguousarray(view[at, :, at], np.float32)


def narrowed(blocks: Array, size: int) -> npt.NDArray[np.float32]:
    """The blocks of ``size`` columns inside (..., count, wide, wide) ones; ``size`` divides wide.

    Shape (..., count * wide / size, size, size).
    """
    *leading, count, wide, _ = blocks.shape
    each = wide // size
    assert each * size == wide, f"blocks of {wide} columns do not hold groups of {size}"
    view = blocks.reshape(*leading, count, each, size, each, size)
    at = np.arange(each)
    found = np.moveaxis(view[..., at, :, at, :], 0, -3)  # the joined index axis comes first
    return np.ascontiguousarray(found.reshape(*leading, count * each, size, size), np.float32)


def of_columns(weights: Array, size: int) -> npt.NDArray[np.float32]:
    """Blocks of ``size`` columns with these weights (cols,) and nothing off the diagonal."""
    groups = np.asarray(weights, np.float32).reshape(-1, size)
    return groups[:, :, None] * np.eye(size, dtype=np.float32)
