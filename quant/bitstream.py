"""Compiled loops that pack codes of a byte each into a bitstream, and back."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.compiled import Kernel, jit

Array = npt.NDArray[Any]


def _slides(bits: int) -> tuple[tuple[int, int, int], ...]:
    """(mask, width, gap) of the steps that slide eight codes of a byte each into one word."""
    lanes = (0x0001000100010001, 0x0000000100000001, 1)
    return tuple(
        (((1 << (bits << step)) - 1) * lanes[step], bits << step, (8 - bits) << step)
        for step in range(3)
    )


@cache
def pack(bits: int) -> Kernel:
    """``(codes, out)``: (rows, cols) uint8 to (rows, cols * bits / 32) uint32, cols in 32s."""
    if bits in (2, 4):
        return _pack_evenly(bits)
    width = 8 * bits
    (m1, w1, g1), (m2, w2, g2), (m3, w3, g3) = _slides(bits)

    def run(codes: Array, out: Array) -> None:
        kernel(codes, out, np.empty(codes.shape[1] // 8, np.uint64))

    @jit
    def kernel(codes: Array, out: Array, words: Array) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            eights = codes[r].view(np.uint64)
            for i in range(columns // 8):
                x = eights[i]
                x = (x & np.uint64(m1)) | ((x >> np.uint64(g1)) & np.uint64(m1 << w1))
                x = (x & np.uint64(m2)) | ((x >> np.uint64(g2)) & np.uint64(m2 << w2))
                words[i] = (x & np.uint64(m3)) | ((x >> np.uint64(g3)) & np.uint64(m3 << w3))
            row = out[r]
            for block in range(columns // 32):
                for j in range(bits):
                    k = (32 * j) // width
                    offset = 32 * j - k * width
                    x = words[4 * block + k] >> np.uint64(offset)
                    if width - offset < 32:
                        x |= words[4 * block + k + 1] << np.uint64(width - offset)
                    row[block * bits + j] = np.uint32(x & np.uint64(0xFFFFFFFF))

    return run


def _pack_evenly(bits: int) -> Kernel:
    """``pack`` where whole codes fill a byte: each made of codes that lie in one narrow word."""
    word = np.uint16 if bits == 4 else np.uint32

    @jit
    def kernel(codes: Array, out: Array) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            words = codes[r].view(word)
            row = out[r].view(np.uint8)
            for i in range(columns * bits // 8):
                x = np.uint32(words[i])
                if bits == 2:
                    x |= np.uint32(x >> np.uint32(12))
                    x |= np.uint32(x >> np.uint32(6))
                else:
                    x |= np.uint32(x >> np.uint32(4))
                row[i] = np.uint8(x & np.uint32(0xFF))

    return kernel


@cache
def unpack(bits: int) -> Kernel:
    """``(packed, codes)``: the inverse of ``pack``, for cols in 8s."""
    (m1, w1, g1), (m2, w2, g2), (m3, w3, g3) = _slides(bits)

    @jit
    def kernel(packed: Array, codes: Array) -> None:
        rows, columns = codes.shape
        for r in range(rows):
            stream = packed[r].view(np.uint8)
            eights = codes[r].view(np.uint64)
            for i in range(columns // 8):
                x = np.uint64(0)
                for j in range(bits):
                    x |= np.uint64(stream[i * bits + j]) << np.uint64(8 * j)
                x = (x & np.uint64(m3)) | ((x & np.uint64(m3 << w3)) << np.uint64(g3))
                x = (x & np.uint64(m2)) | ((x & np.uint64(m2 << w2)) << np.uint64(g2))
                eights[i] = (x & np.uint64(m1)) | ((x & np.uint64(m1 << w1)) << np.uint64(g1))

    return kernel
