"""Packed codes as MLX stores them: one little-endian bitstream per row, viewed as uint32."""

import sys

import numpy as np
import numpy.typing as npt

from quant.floats import refuse_read_only

assert sys.byteorder == "little", "packed codes are viewed, not swapped"


def pack_rows(
    codes: npt.NDArray[np.uint8],
    bits: int,
    *,
    out: npt.NDArray[np.uint32] | None = None,
) -> npt.NDArray[np.uint32]:
    """Pack (rows, cols) codes, each below 2**bits, to (rows, cols * bits / 32); cols in 32s.

    Raises ValueError where ``out`` is read-only.
    """
    rows, columns = codes.shape
    assert columns % 32 == 0, f"{columns} codes per row do not fill whole words"
    if out is None:
        out = np.empty((rows, columns * bits // 32), np.uint32)
    refuse_read_only(out, "out")
    if bits == 8:
        out[:] = codes.view(np.uint32)
        return out
    from quant import bitstream

    bitstream.pack(bits)(codes, out)
    return out


def unpack_rows(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """Codes (rows, cols), one a byte, of (rows, cols * bits / 32) words: inverse of pack_rows."""
    rows, words = packed.shape
    if bits == 8:
        return np.ascontiguousarray(packed).view(np.uint8)
    from quant import bitstream

    columns = words * 32 // bits
    codes = np.empty((rows, columns), np.uint8)
    bitstream.unpack(bits)(packed, codes)
    return codes
