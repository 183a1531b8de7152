"""gpt-oss experts: ``X_blocks`` and ``X_scales``, MXFP4 along the input.

Blocks are [experts, out, groups, 16] bytes, two codes each, the low nibble first; the plain tensor
``X`` is [experts, in, out], as transformers unpacks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter.decode.build import Builder
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class Mxfp4(BlockCodec):
    """Rows of packed E2M1 codes with an E8M0 scale per 32; leading axes flattened."""

    packed: str
    scale: str
    columns: int

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows of axis 0."""
        found = None
        if codes:
            stored = raw.read_rows(self.packed, start, stop)
            found = unpack.nibbles(stored.reshape(-1, self.columns // 2))
        scales = raw.read_rows(self.scale, start, stop).view(np.uint8)
        return Block(
            columns=self.columns,
            table=tables.e2m1(),
            codes=found,
            scales=tables.e8m0(scales.reshape(-1, self.columns // 32)),
            group=32,
        )


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every pair of blocks and scales."""
    for name in build.with_ending("_blocks"):
        packed, scale = f"{name}_blocks", f"{name}_scales"
        blocks = build.tensors[packed]
        if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            build.problem(
                f"{packed}: is {blocks.dtype} {list(blocks.shape)}, not U8 [experts, out, groups, "
                "16]"
            )
            continue
        count, out, groups, _ = blocks.shape
        if build.expect(scale, ("U8", "F8_E8M0"), (count, out, groups), needed_by=packed) is None:
            continue
        build.add(
            Coded(
                name=name,
                stored=(count, out, 32 * groups),
                axes=(0, 2, 1),
                reads=(packed, scale),
                codec=Mxfp4(packed, scale, 32 * groups),
                form="MXFP4",
                native=Native(spec=QuantSpec.make("mxfp4")),
            )
        )
