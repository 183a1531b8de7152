"""The element types of GGUF files: rows of blocks to codes, scales and minima.

A block is a run of bytes for 32 or 256 elements of a row. Layouts follow ``ggml-common.h`` and
``ggml-quants.c`` of llama.cpp. All are codes into a table, a scale and perhaps a minimum for each
16 or 32 elements, so ``Block`` decodes and repacks every one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quant.decode import tables
from quant.decode.block import Block
from quant.recipe import QuantSpec

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Unpacked = tuple[Bytes, Floats, Floats | None]
"""Codes (rows, blocks, elements), scales and minima (rows, blocks, groups)."""

_SHIFTS: Final = {bits: np.arange(0, 8, bits, dtype=np.uint8)[:, None] for bits in (1, 2, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """An element type: how many bytes hold how many elements, and what they mean."""

    name: str
    block: int = 1
    """Elements of a block."""
    nbytes: int
    """Bytes of a block."""
    plain: str = ""
    """The safetensors dtype of plain numbers."""
    unpack: Callable[[Bytes], Unpacked] | None = None
    """Takes (rows, blocks, nbytes); None for what is not decoded."""
    table: Callable[[], tables.Table] | None = None
    group: int = 32
    """Elements that share a scale."""
    native: tuple[QuantSpec, str] | None = None
    """MLX's format of the same codes, and the dtype that its scales and biases take."""

    @property
    def decoded(self) -> bool:
        """Whether its values can be read here."""
        return bool(self.plain) or self.unpack is not None


def blocks_of(kind: GgmlType, rows: Bytes) -> Block:
    """(rows, bytes) of a tensor of this type."""
    assert kind.unpack is not None
    assert kind.table is not None
    count = rows.shape[-1] // kind.nbytes
    codes, scales, minima = kind.unpack(rows.reshape(len(rows), count, kind.nbytes))
    return Block(
        columns=count * kind.block,
        table=kind.table(),
        codes=codes.reshape(len(rows), count * kind.block),
        scales=scales.reshape(len(rows), -1),
        minima=None if minima is None else minima.reshape(len(rows), -1),
        group=kind.group,
    )


def _half(part: Bytes) -> Floats:
    """Two bytes of each block as a float16."""
    values: npt.NDArray[Any] = np.ascontiguousarray(part).view("<f2").astype(np.float32)
    return values


def _fields(part: Bytes, bits: int, run: int) -> Bytes:
    """Fields of ``bits`` bits: those in the lowest bits of ``run`` bytes, then the next higher."""
    rows, count, size = part.shape
    shifts = _SHIFTS[bits]
    out = np.empty((rows, count, size // run, len(shifts), run), np.uint8)
    np.right_shift(part.reshape(rows, count, size // run, 1, run), shifts, out=out)
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(rows, count, -1)


def _q4_0(b: Bytes) -> Unpacked:
    return _fields(b[..., 2:], 4, 16), _half(b[..., :2]), None


def _q4_1(b: Bytes) -> Unpacked:
    return _fields(b[..., 4:], 4, 16), _half(b[..., :2]), _half(b[..., 2:4])


def _fifth_bit(low: Bytes, high: Bytes) -> Bytes:
    """Four bits with a fifth from a bit field, an element to a bit."""
    low |= np.unpackbits(high, axis=-1, bitorder="little") << np.uint8(4)
    return low


def _q5_0(b: Bytes) -> Unpacked:
    return _fifth_bit(_fields(b[..., 6:], 4, 16), b[..., 2:6]), _half(b[..., :2]), None


def _q5_1(b: Bytes) -> Unpacked:
    codes = _fifth_bit(_fields(b[..., 8:], 4, 16), b[..., 4:8])
    return codes, _half(b[..., :2]), _half(b[..., 2:4])


def _q8_0(b: Bytes) -> Unpacked:
    return b[..., 2:] ^ np.uint8(0x80), _half(b[..., :2]), None


def _q2_k(b: Bytes) -> Unpacked:
    scales = (b[..., :16] & np.uint8(15)).astype(np.float32)
    minima = (b[..., :16] >> np.uint8(4)).astype(np.float32)
    codes = _fields(b[..., 16:80], 2, 32)
    return codes, _half(b[..., 80:82]) * scales, -(_half(b[..., 82:84]) * minima)


def _q3_k(b: Bytes) -> Unpacked:
    codes = _fields(b[..., 32:96], 2, 32)
    codes |= _fields(b[..., :32], 1, 32) << np.uint8(2)
    scales = _fields(b[..., 96:104], 4, 8)
    scales |= _fields(b[..., 104:108], 2, 4) << np.uint8(4)
    return codes, _half(b[..., 108:110]) * (scales.astype(np.float32) - np.float32(32)), None


def _six_bits(part: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight minima of six bits in twelve bytes."""
    first, second, third = part[..., :4], part[..., 4:8], part[..., 8:]
    top = np.uint8(0x30)
    scales = [first & np.uint8(63), (third & np.uint8(15)) | (first >> np.uint8(2) & top)]
    minima = [second & np.uint8(63), (third >> np.uint8(4)) | (second >> np.uint8(2) & top)]
    return (
        np.concatenate(scales, axis=-1).astype(np.float32),
        np.concatenate(minima, axis=-1).astype(np.float32),
    )


def _q4_k(b: Bytes) -> Unpacked:
    scales, minima = _six_bits(b[..., 4:16])
    codes = _fields(b[..., 16:], 4, 32)
    return codes, _half(b[..., :2]) * scales, -(_half(b[..., 2:4]) * minima)


def _q5_k(b: Bytes) -> Unpacked:
    scales, minima = _six_bits(b[..., 4:16])
    codes = _fields(b[..., 48:], 4, 32)
    codes |= _fields(b[..., 16:48], 1, 32) << np.uint8(4)
    return codes, _half(b[..., :2]) * scales, -(_half(b[..., 2:4]) * minima)


def _q6_k(b: Bytes) -> Unpacked:
    codes = _fields(b[..., :128], 4, 64)
    codes |= _fields(b[..., 128:192], 2, 32) << np.uint8(4)
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(b[..., 208:210]) * scales, None


def _iq4_xs(b: Bytes) -> Unpacked:
    high = np.ascontiguousarray(b[..., 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[..., 4:8] & np.uint8(15), b[..., 4:8] >> np.uint8(4)], axis=-1)
    scales = low.reshape(high.shape) | ((high & np.uint16(3)) << np.uint16(4))
    codes = _fields(b[..., 8:], 4, 16)
    return codes, _half(b[..., :2]) * (scales.astype(np.float32) - np.float32(32)), None


def _mxfp4(b: Bytes) -> Unpacked:
    return _fields(b[..., 1:], 4, 16), tables.e8m0(np.ascontiguousarray(b[..., :1])), None


def _affine(bits: int, scales: str) -> tuple[QuantSpec, str]:
    return QuantSpec.make("affine", bits, 32), scales


Unpack = Callable[[Bytes], Unpacked]
TableOf = Callable[[int], tables.Table]


def _small(name: str, nbytes: int, bits: int, unpack: Unpack, table: TableOf) -> GgmlType:
    """Blocks of 32 with a half for the scale, and one for the minimum where there is one."""
    return GgmlType(
        name=name,
        block=32,
        nbytes=nbytes,
        unpack=unpack,
        table=partial(table, bits),
        native=_affine(bits, "F16"),
    )


def _k_quant(
    name: str, nbytes: int, bits: int, unpack: Unpack, table: TableOf, *, group: int = 32
) -> GgmlType:
    """Blocks of 256 whose scales are a half times a few bits, which takes a float32."""
    return GgmlType(
        name=name,
        block=256,
        nbytes=nbytes,
        unpack=unpack,
        table=partial(table, bits),
        group=group,
        native=_affine(bits, "F32") if group == 32 else None,
    )


TYPES: Final[dict[int, GgmlType]] = {
    0: GgmlType(name="F32", nbytes=4, plain="F32"),
    1: GgmlType(name="F16", nbytes=2, plain="F16"),
    2: _small("Q4_0", 18, 4, _q4_0, tables.offset),
    3: _small("Q4_1", 20, 4, _q4_1, tables.unsigned),
    6: _small("Q5_0", 22, 5, _q5_0, tables.offset),
    7: _small("Q5_1", 24, 5, _q5_1, tables.unsigned),
    8: _small("Q8_0", 34, 8, _q8_0, tables.offset),
    9: GgmlType(name="Q8_1", block=32, nbytes=40),
    10: _k_quant("Q2_K", 84, 2, _q2_k, tables.unsigned, group=16),
    11: _k_quant("Q3_K", 110, 3, _q3_k, tables.offset, group=16),
    12: _k_quant("Q4_K", 144, 4, _q4_k, tables.unsigned),
    13: _k_quant("Q5_K", 176, 5, _q5_k, tables.unsigned),
    14: _k_quant("Q6_K", 210, 6, _q6_k, tables.offset, group=16),
    15: GgmlType(name="Q8_K", block=256, nbytes=292),
    16: GgmlType(name="IQ2_XXS", block=256, nbytes=66),
    17: GgmlType(name="IQ2_XS", block=256, nbytes=74),
    18: GgmlType(name="IQ3_XXS", block=256, nbytes=98),
    19: GgmlType(name="IQ1_S", block=256, nbytes=50),
    20: GgmlType(name="IQ4_NL", block=32, nbytes=18, unpack=_q4_0, table=tables.iq4),
    21: GgmlType(name="IQ3_S", block=256, nbytes=110),
    22: GgmlType(name="IQ2_S", block=256, nbytes=82),
    23: GgmlType(name="IQ4_XS", block=256, nbytes=136, unpack=_iq4_xs, table=tables.iq4),
    24: GgmlType(name="I8", nbytes=1),
    25: GgmlType(name="I16", nbytes=2),
    26: GgmlType(name="I32", nbytes=4),
    27: GgmlType(name="I64", nbytes=8),
    28: GgmlType(name="F64", nbytes=8),
    29: GgmlType(name="IQ1_M", block=256, nbytes=56),
    30: GgmlType(name="BF16", nbytes=2, plain="BF16"),
    34: GgmlType(name="TQ1_0", block=256, nbytes=54),
    35: GgmlType(name="TQ2_0", block=256, nbytes=66),
    39: GgmlType(
        name="MXFP4",
        block=32,
        nbytes=17,
        unpack=_mxfp4,
        table=tables.e2m1,
        native=(QuantSpec.make("mxfp4"), ""),
    ),
    40: GgmlType(name="NVFP4", block=64, nbytes=36),
}
"""Every type by its number in a file."""
BY_NAME: Final = {kind.name: kind for kind in TYPES.values()}
