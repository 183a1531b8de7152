"""What the codes of each element type stand for, as float32 look-up tables."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float32]


@cache
def unsigned(bits: int) -> Table:
    """Codes as they are: 0 .. 2**bits - 1."""
    return np.arange(1 << bits, dtype=np.float32)


@cache
def offset(bits: int) -> Table:
    """Signed integers stored with 2**(bits-1) added."""
    return unsigned(bits) - np.float32(1 << (bits - 1))


@cache
def e4m3() -> Table:
    """FP8 E4M3 (OCP, no infinity): codes 0x7F and 0xFF are NaN."""
    table: Table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return table


@cache
def e5m2() -> Table:
    """FP8 E5M2 (OCP): with infinities and NaN."""
    table: Table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
    return table


@cache
def e2m1() -> Table:
    """FP4 E2M1 (OCP): sign, then 0 0.5 1 1.5 2 3 4 6."""
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([half, -half])


def e8m0(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scales of powers of two, biased by 127; 0xFF is NaN."""
    values: npt.NDArray[Any] = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values


@cache
def nf4() -> Table:
    """NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes writes it."""
    return np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        np.float32,
    )


@cache
def iq4() -> Table:
    """The sixteen levels of GGML's IQ4_NL and IQ4_XS (``kvalues_iq4nl`` of ggml-common.h)."""
    return np.array(
        [*(-127, -104, -83, -65, -49, -35, -22, -10), *(1, 13, 25, 38, 53, 69, 89, 113)],
        np.float32,
    )
