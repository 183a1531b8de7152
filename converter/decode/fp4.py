"""FP4 matrices of compressed-tensors and ModelOpt: NVFP4 and MXFP4, two codes a byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converter.decode.build import Builder
from converter.decode.gpt_oss import Mxfp4
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class Nvfp4(BlockCodec):
    """Rows of E2M1 codes with an E4M3 scale per 16, times or over one of the whole tensor."""

    packed: str
    scale: str
    whole: str
    columns: int
    divide: bool

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``; the two scales are combined in float32 first."""
        whole = raw.read_rows(self.whole, 0, 1).astype(np.float32).reshape(())
        scales = raw.read_rows(self.scale, start, stop).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            combined = scales / whole if self.divide else scales * whole
        return Block(
            columns=self.columns,
            table=tables.e2m1(),
            codes=unpack.nibbles(raw.read_rows(self.packed, start, stop)) if codes else None,
            scales=combined,
            group=16,
        )


def add_nvfp4(build: Builder, module: str, packed: str, whole: str, *, divide: bool) -> None:
    """One NVFP4 matrix.

    It has no counterpart: stock linear layers take nvfp4 codes and block scales only, and the
    scale of the tensor cannot be folded into E4M3 without rounding.
    """
    weight = build.expect(packed, ("U8",), needed_by=module)
    if weight is None:
        return
    if len(weight.shape) != 2 or weight.shape[1] % 8:
        build.problem(f"{packed}: {list(weight.shape)} does not hold rows of whole groups of 16")
        return
    out, half = weight.shape
    scale = build.expect(f"{module}.weight_scale", ("F8_E4M3",), (out, half // 8), needed_by=packed)
    global_scale = build.expect(whole, ("F32", "BF16", "F16"), (1,), (), (1, 1), needed_by=packed)
    if scale is None or global_scale is None:
        return
    build.add(
        Coded(
            name=f"{module}.weight",
            stored=(out, 2 * half),
            reads=(packed, scale.name, whole),
            codec=Nvfp4(packed, scale.name, whole, 2 * half, divide),
            form="NVFP4 with a tensor scale",
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
