"""Microscaled formats: mxfp4 and mxfp8 (power of two per 32) and nvfp4 (E4M3 per 16)."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from quant.floats import KINDS, as_bits, reject_group
from quant.packing import unpack_rows
from quant.recipe import QuantSpec

ROUNDING_RULES: Final[dict[str, str]] = {
    "affine": "edge-exact scale and bias in float32, codes half to even; rtn and search keep the "
    "symmetric grid of a group that lies on one",
    "mxfp4": "E8M0 = ceil(log2(amax / 6)), E2M1 nearest, ties to the lower magnitude",
    "mxfp8": "E8M0 = ceil(log2(amax / 448)), E4M3 nearest even, saturating",
    "nvfp4": "E4M3(amax / 6) nearest even, E2M1 nearest, ties to the lower magnitude",
}
"""How scales and codes are rounded, by mode; runtimes have changed these between versions."""

_FORMATS: Final = {"mxfp4": 0, "mxfp8": 1, "nvfp4": 2}


def quantize_microscaled(
    w: npt.NDArray[Any], spec: QuantSpec, *, out: dict[str, npt.NDArray[Any]]
) -> None:
    """Fill ``out``'s weight and scales from (rows, cols) ``w``, as mx.quantize on CPU does.

    Methods "mlx" and "rtn" coincide wherever the format can express the block. Outside, "mlx"
    repeats mx.quantize (block exponents under -127 wrap around; nvfp4 values beyond about 1e5
    may become anything) while "rtn" saturates.
    """
    kind = KINDS[CODES[w.dtype]]
    packed = out["weight"].view(np.uint8)
    if spec.bits == 8:
        from quant import kernels

        kernel = kernels.mxfp8_codes(kind)
    else:
        from quant import kernels_fp4

        kernel = kernels_fp4.e2m1_codes(kind, _FORMATS[spec.mode])
    index = kernel(as_bits(w), spec.method == "mlx", packed, out["scales"])
    if index >= 0:
        raise reject_group(w, index, spec.group_size)


def dequantize_microscaled(
    parts: dict[str, npt.NDArray[Any]], spec: QuantSpec, dtype_code: str
) -> npt.NDArray[Any]:
    """(rows, cols) values as mx.dequantize(dtype=...): scale and product in ``dtype_code``."""
    from quant import kernels

    codes = unpack_rows(parts["weight"], spec.bits)
    out = np.empty(codes.shape, NUMPY_DTYPES[dtype_code])
    kernel = kernels.microscaled_values(KINDS[dtype_code], _FORMATS[spec.mode])
    kernel(codes, parts["scales"], as_bits(out))
    return out
