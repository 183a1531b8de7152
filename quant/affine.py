"""Affine quantization: groups of a row share a scale and a bias, w = scale * code + bias."""

from typing import Any

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from quant.floats import KINDS, as_bits, cast, reject_group
from quant.lattice import keep_lattice
from quant.packing import pack_rows, unpack_rows
from quant.recipe import QuantSpec

_SLICE = 1 << 20
"""Codes in flight between the two loops, in bytes: few calls, and they stay in the cache."""


def quantize_affine(
    w: npt.NDArray[Any], spec: QuantSpec, *, out: dict[str, npt.NDArray[Any]]
) -> None:
    """Fill ``out``'s weight, scales and biases from (rows, cols) ``w``.

    Method "mlx" gives what mx.quantize gives on CPU: codes from the unrounded scale and bias.
    Method "rtn" takes codes from the scale and bias as stored, which is never worse, and keeps the
    grid of groups that lie on one already.
    """
    from quant import kernels

    kind = KINDS[CODES[w.dtype]]
    quantize = kernels.affine_codes(kind, spec.group_size)
    levels = np.float32(2**spec.bits - 1)
    rows, columns = w.shape
    step = max(1, _SLICE // columns)
    scratch = np.empty((0 if spec.bits == 8 else min(step, rows), columns), np.uint8)
    bits = as_bits(w)
    scales, biases = as_bits(out["scales"]), as_bits(out["biases"])
    for row in range(0, rows, step):
        block = slice(row, min(row + step, rows))
        packed = out["weight"][block]
        codes = packed.view(np.uint8) if spec.bits == 8 else scratch[: block.stop - row]
        index = quantize(
            bits[block],
            levels,
            spec.method == "rtn",
            codes,
            scales[block],
            biases[block],
        )
        if index >= 0:
            raise reject_group(w, row * columns + index, spec.group_size)
        if spec.bits != 8:
            pack_rows(codes, spec.bits, out=packed)
    if spec.method == "rtn":
        parts = {"weight": out["weight"], "scales": scales, "biases": biases}
        keep_lattice(bits, spec, kind, parts=parts)


def dequantize_affine(
    parts: dict[str, npt.NDArray[Any]], spec: QuantSpec, dtype_code: str
) -> npt.NDArray[Any]:
    """(rows, cols) values as mx.dequantize: computed in the scales' type, then cast."""
    from quant import kernels

    scales = parts["scales"]
    own = CODES[scales.dtype]
    codes = unpack_rows(parts["weight"], spec.bits)
    out = np.empty(codes.shape, NUMPY_DTYPES[own])
    kernel = kernels.affine_values(KINDS[own], spec.group_size)
    kernel(codes, as_bits(scales), as_bits(parts["biases"]), as_bits(out))
    return cast(out, dtype_code)
