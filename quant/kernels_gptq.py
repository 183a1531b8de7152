"""The compiled inner loop of GPTQ."""

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit
from quant.kernels import _load_e2m1, _load_e4m3, _store_e2m1, _store_e4m3

Array = npt.NDArray[Any]

AFFINE, FP4, FP8 = range(3)
_ZERO: Final = np.float32(0)


@cache
def round_block(element: int) -> Kernel:
    """``(w, scale, bias, levels, u, codes, errors)``: rounds one block of columns in their order.

    ``w`` (rows, size) is spoilt; ``scale`` and ``bias`` have its shape; ``u`` (size, size) is
    the block of the upper Cholesky factor of the inverse Hessian. ``errors`` get each column's
    rounding error over its diagonal, for the columns after the block.
    """

    @jit
    def kernel(
        w: Array,
        scale: Array,
        bias: Array,
        levels: np.float32,
        u: Array,
        codes: Array,
        errors: Array,
    ) -> None:
        rows, size = w.shape
        for r in range(rows):
            row = w[r]
            for j in range(size):
                s = scale[r, j]
                if element == AFFINE:
                    q = np.float32(np.rint((row[j] - bias[r, j]) / s))
                    q = min(max(q, _ZERO), levels)
                    codes[r, j] = np.uint8(q)
                    value = s * q + bias[r, j]
                else:
                    y = row[j] / s if s > _ZERO else _ZERO
                    code = _store_e4m3(y) if element == FP8 else _store_e2m1(y)
                    codes[r, j] = np.uint8(code)
                    value = s * (_load_e4m3(code) if element == FP8 else _load_e2m1(code))
                e = np.float32((row[j] - value) / u[j, j])
                errors[r, j] = e
                for k in range(j + 1, size):
                    row[k] -= e * u[j, k]

    return kernel
