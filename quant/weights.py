"""Quantize and dequantize weight matrices in any supported format."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from quant.affine import dequantize_affine, quantize_affine
from quant.floats import KINDS, refuse_read_only
from quant.microscaling import dequantize_microscaled, quantize_microscaled
from quant.recipe import CODED, QuantSpec
from quant.search import quantize_searched


def quantize_rows(
    w: npt.NDArray[Any],
    spec: QuantSpec,
    *,
    out: Mapping[str, npt.NDArray[Any]] | None = None,
    moments: npt.NDArray[np.float32] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Quantize (..., cols) float32, float16 or bfloat16 along the last axis.

    Returns ``weight`` (uint32 codes), ``scales`` and, for affine, ``biases`` with the types and
    shapes of ``spec.output_tensors``; fills the C-contiguous arrays of ``out`` where given.
    ``moments`` (cols / group, group, group) are the second moments of the inputs that method
    "imatrix" minimises output errors with; of stacked matrices one for each. "gptq" and
    "autoround" quantize whole matrices (``quant.gptq``, ``quant.tune``). Runs in the calling thread
    without the GIL. Raises NonFiniteError at the first NaN or infinity, its row counted over all
    leading axes, ValueError where an array of ``out`` is read-only.
    """
    code = CODES[w.dtype]
    assert code in KINDS, f"{code} weights are not quantized directly"
    assert w.flags.c_contiguous, "rows must be contiguous"
    tensors = spec.output_tensors(w.shape, code)
    parts = {}
    for suffix, (part_code, shape) in tensors.items():
        part = np.empty(shape, NUMPY_DTYPES[part_code]) if out is None else out[suffix]
        assert part.shape == shape, f"{suffix}: {part.shape} is not {shape}"
        assert part.flags.c_contiguous, f"{suffix} must be contiguous"
        refuse_read_only(part, suffix)
        parts[suffix] = part
    if w.size == 0:
        return parts
    flat = {suffix: part.reshape(-1, part.shape[-1]) for suffix, part in parts.items()}
    assert spec.method not in CODED, (
        f"{spec.method} is not row-local; its codes come from calibration"
    )
    assert moments is None or spec.method == "imatrix", "imatrix alone takes moments"
    if spec.method in ("search", "imatrix"):
        if moments is None or moments.ndim == 3:
            quantize_searched(w.reshape(-1, w.shape[-1]), spec, moments=moments, out=flat)
            return parts
        assert w.ndim == 3, f"moments of {len(moments)} matrices for one"
        for index, own in enumerate(moments):
            each = {suffix: part[index] for suffix, part in parts.items()}
            quantize_rows(w[index], spec, out=each, moments=own)
        return parts
    quantize = quantize_affine if spec.mode == "affine" else quantize_microscaled
    quantize(w.reshape(-1, w.shape[-1]), spec, out=flat)
    return parts


def dequantize_rows(
    parts: Mapping[str, npt.NDArray[Any]], spec: QuantSpec, dtype_code: str
) -> npt.NDArray[Any]:
    """The (..., cols) values that ``parts`` stand for, bit for bit as mx.dequantize.

    Affine values are computed in the type of the scales and cast to ``dtype_code`` after;
    microscaled ones are computed in ``dtype_code``, one of F32, F16 and BF16.
    """
    leading = parts["weight"].shape[:-1]
    flat = {
        suffix: np.ascontiguousarray(part).reshape(-1, part.shape[-1])
        for suffix, part in parts.items()
    }
    dequantize = dequantize_affine if spec.mode == "affine" else dequantize_microscaled
    values = dequantize(flat, spec, dtype_code)
    return values.reshape(*leading, values.shape[-1])
