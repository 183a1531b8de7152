"""Groups that lie on a symmetric grid already, as quantization-aware training leaves them.

Releases such as Gemma's QAT checkpoints store ``d * k`` rounded to bfloat16, with one ``d`` for 32
columns and integer k whose largest magnitude is 2**(bits-1), or one less. Plain rounding takes its
grid from the extremes of a group, and misses the trained one wherever the other extreme is unused.
Here a group is tried for that grid: its edge, the value of largest magnitude, fixes ``d``, and a
group is on the grid where every value is within the rounding of bfloat16 of a multiple. Rows
that have no such group among their first are left alone, each by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quant.packing import pack_rows, unpack_rows
from quant.recipe import QuantSpec

Array = npt.NDArray[Any]


def keep_lattice(w: Array, spec: QuantSpec, kind: int, *, parts: dict[str, Array]) -> None:
    """Keep the grid of what method "rtn" made of (rows, cols) bits ``w`` of type ``kind``.

    ``parts`` holds the packed weight, and the bits of scales and biases.
    """
    from quant import kernels_lattice

    middle = _middle(spec)
    if not kernels_lattice.trained(kind, spec.group_size)(w, parts["biases"], middle):
        return
    codes = unpack_rows(parts["weight"], spec.bits)
    keep_codes(
        w,
        spec,
        kind,
        edges=parts["biases"],
        codes=codes,
        scales=parts["scales"],
        biases=parts["biases"],
    )
    pack_rows(codes, spec.bits, out=parts["weight"])


def keep_codes(
    w: Array,
    spec: QuantSpec,
    kind: int,
    *,
    edges: Array,
    codes: Array,
    scales: Array,
    biases: Array,
) -> None:
    """Replace codes, scale and bias of the groups that lie on a grid.

    ``w`` (rows, cols), ``edges``, ``scales`` and ``biases`` (rows, groups) are bits of type
    ``kind``. What is put in a group's place brings every value back as the bfloat16 it is, or has
    the smaller squared error.
    """
    from quant import kernels_lattice

    kernel = kernels_lattice.lattice(kind, spec.group_size)
    kernel(w, edges, _middle(spec), codes, scales, biases)


def _middle(spec: QuantSpec) -> np.float32:
    return np.float32(1 << (spec.bits - 1))
