"""Codes of a byte each out of every packing that releases use."""

from typing import Any

import numpy as np
import numpy.typing as npt

from quant.packing import unpack_rows

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.uint8]


def nibbles(packed: Array) -> Codes:
    """(rows, n) bytes to (rows, 2 n) codes, the low nibble first."""
    rows, count = packed.shape
    codes = np.empty((rows, count, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return codes.reshape(rows, 2 * count)


def nibbles_high_first(packed: Array) -> Codes:
    """(n,) bytes to (2 n,) codes, the high nibble first, as bitsandbytes packs."""
    codes = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed.reshape(-1), 4, out=codes[:, 0])
    np.bitwise_and(packed.reshape(-1), 15, out=codes[:, 1])
    return codes.reshape(-1)


def streams(packed: Array, bits: int) -> Codes:
    """(n * bits / 32, cols) words, each column a little-endian bitstream, to (cols, n) codes.

    How GPTQ packs along the input: transposed, it is MLX's own packing.
    """
    return unpack_rows(transposed(packed.view(np.uint32)), bits)


def words(packed: Array, bits: int) -> Codes:
    """(rows, n) words to (rows, n * (32 // bits)) codes, the lowest bits first, none split."""
    rows, count = packed.shape
    each = 32 // bits
    codes = np.empty((rows, count, each), np.uint8)
    source = packed.view(np.uint32)
    for place in range(each):
        codes[:, :, place] = (source >> np.uint32(bits * place)) & np.uint32((1 << bits) - 1)
    return codes.reshape(rows, count * each)


def awq(packed: Array) -> Codes:
    """(rows, n) words of AutoAWQ's GEMM layout to (8 n, rows) codes of 4 bits: a transpose."""
    from quant.decode import kernels

    codes = np.empty((8 * packed.shape[1], packed.shape[0]), np.uint8)
    kernels.interleaved_nibbles(np.ascontiguousarray(packed).view(np.uint32), codes)
    return codes


def quarters(packed: Array, part: int) -> Codes:
    """Two of the eight bits of each byte: part 0 the lowest; BitNet packs four row blocks so."""
    return (packed >> np.uint8(2 * part)) & np.uint8(3)


def transposed(x: Array) -> Array:
    """A C-contiguous transpose of a matrix."""
    from quant.decode import kernels

    out = np.empty(x.shape[::-1], x.dtype)
    kernels.transpose_bytes(np.ascontiguousarray(x), out)
    return out
