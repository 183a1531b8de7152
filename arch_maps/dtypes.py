"""Element types by their safetensors code, and the numpy types that hold them."""

from typing import Final

import ml_dtypes
import numpy as np

NUMPY_DTYPES: Final[dict[str, np.dtype]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES: Final[dict[np.dtype, str]] = {dtype: code for code, dtype in NUMPY_DTYPES.items()}
FLOAT_CODES: Final[frozenset[str]] = frozenset(
    code for code in NUMPY_DTYPES if code.startswith(("F", "BF"))
)
TORCH_NAMES: Final[dict[str, str]] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}


def itemsize(code: str) -> int:
    """Bytes per element of the safetensors dtype ``code``."""
    return NUMPY_DTYPES[code].itemsize
