"""FP4 matrices of compressed-tensors and ModelOpt: NVFP4 and MXFP4, two codes a byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converter.decode.build import Builder
from converter.decode.fp8 import FLOATS
from converter.decode.gpt_oss import Mxfp4
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class Nvfp4(BlockCodec):
    """Rows of E2M1 codes with an E4M3 scale per 16, times or over one of the whole tensor.

    Of matrices stacked [matrices, out, in], each has a scale of its own.
    """

    packed: str
    scale: str
    whole: str
    columns: int
    divide: bool

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows of axis 0, leading axes flattened; the two scales are combined in float32 first."""
        scales = raw.read_rows(self.scale, start, stop).astype(np.float32)
        stacked = scales.ndim == 3
        each = raw.read_rows(self.whole, *((start, stop) if stacked else (0, 1)))
        whole = each.astype(np.float32).reshape((-1, 1, 1) if stacked else ())
        with np.errstate(divide="ignore", invalid="ignore"):
            combined = scales / whole if self.divide else scales * whole
        found = None
        if codes:
            stored = raw.read_rows(self.packed, start, stop)
            found = unpack.nibbles(stored.reshape(-1, self.columns // 2))
        return Block(
            columns=self.columns,
            table=tables.e2m1(),
            codes=found,
            scales=combined.reshape(-1, self.columns // 16),
            group=16,
        )


def add_nvfp4(
    build: Builder, name: str, packed: str, scale: str, whole: str, *, divide: bool
) -> None:
    """One NVFP4 matrix, or a stack of them, that becomes the plain tensor ``name``.

    It has no counterpart: stock linear layers take nvfp4 codes and block scales only, and the
    scale of the tensor cannot be folded into E4M3 without rounding.
    """
    weight = build.expect(packed, ("U8",), needed_by=name)
    if weight is None:
        return
    if len(weight.shape) not in (2, 3) or weight.shape[-1] % 8:
        build.problem(f"{packed}: {list(weight.shape)} does not hold rows of whole groups of 16")
        return
    *lead, out, half = weight.shape
    blocks = build.expect(scale, ("F8_E4M3",), (*lead, out, half // 8), needed_by=packed)
    each = (*lead, 1), (*lead, 1, 1)
    factor = build.expect(whole, FLOATS, tuple(lead), *each, needed_by=packed)
    if blocks is None or factor is None:
        return
    build.add(
        Coded(
            name=name,
            stored=(*lead, out, 2 * half),
            reads=(packed, scale, whole),
            codec=Nvfp4(packed, scale, whole, 2 * half, divide),
            form=f"NVFP4 with {'a scale per matrix' if lead else 'a tensor scale'}",
        )
    )


def add_mxfp4(build: Builder, module: str) -> None:
    """One MXFP4 matrix of compressed-tensors."""
    packed = f"{module}.weight_packed"
    weight = build.expect(packed, ("U8",), needed_by=module)
    if weight is None:
        return
    if len(weight.shape) != 2 or weight.shape[1] % 16:
        build.problem(f"{packed}: {list(weight.shape)} does not hold rows of whole groups of 32")
        return
    out, half = weight.shape
    scale = build.expect(
        f"{module}.weight_scale", ("U8", "F8_E8M0"), (out, half // 16), needed_by=packed
    )
    if scale is None:
        return
    build.add(
        Coded(
            name=f"{module}.weight",
            stored=(out, 2 * half),
            reads=(packed, scale.name),
            codec=Mxfp4(packed, scale.name, 2 * half),
            form="MXFP4",
            native=Native(spec=QuantSpec.make("mxfp4")),
        )
    )
