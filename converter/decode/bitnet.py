"""BitNet: ternary matrices, four rows to a byte a quarter of the rows apart, and one scale.

As transformers packs them. ``bitlinear`` layers divide by ``weight_scale``, ``autobitlinear`` ones
multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter.decode.build import Builder, groups_for
from converter.decode.fp8 import FLOATS
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class Ternary(BlockCodec):
    """Rows of codes 0, 1, 2 for -1, 0, 1; row r lies in byte row r % quarter."""

    name: str
    scale: str
    quarter: int
    columns: int
    divide: bool

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        scale = raw.read_rows(self.scale, 0, 1).astype(np.float32).reshape(1, 1)
        with np.errstate(divide="ignore"):
            scale = np.float32(1) / scale if self.divide else scale
        return Block(
            columns=self.columns,
            table=tables.unsigned(2) - np.float32(1),
            codes=self._codes(raw, start, stop) if codes else None,
            scales=np.ascontiguousarray(np.broadcast_to(scale, (stop - start, 1))),
            group=self.columns,
        )

    def _codes(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        pieces = []
        at = start
        while at < stop:
            part, row = divmod(at, self.quarter)
            end = min(stop, (part + 1) * self.quarter)
            packed = raw.read_rows(self.name, row, row + end - at)
            pieces.append(unpack.quarters(packed, part))
            at = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every matrix with a ``weight_scale``."""
    linear = settings.get("linear_class", "bitlinear")
    mode = settings.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode != "offline":
        build.problem(
            f"config.json: BitNet {linear!r} quantized {mode!r} is not decoded; only bitlinear "
            "and autobitlinear, offline, are"
        )
        return
    for module in build.with_ending(".weight_scale"):
        name = f"{module}.weight"
        weight = build.expect(name, ("U8",), needed_by=f"{module}.weight_scale")
        scale = build.expect(f"{module}.weight_scale", FLOATS, (1,), (), needed_by=name)
        if weight is None or scale is None:
            continue
        if len(weight.shape) != 2:
            build.problem(f"{name}: {list(weight.shape)} is no matrix")
            continue
        quarter, columns = weight.shape
        size = groups_for(columns, columns)
        divide = linear == "bitlinear"
        native = None
        if size is not None:
            stored = "F32" if divide else scale.dtype
            native = Native(spec=QuantSpec.make("affine", 2, size), scales=stored)
        build.add(
            Coded(
                name=name,
                stored=(4 * quarter, columns),
                reads=(name, scale.name),
                codec=Ternary(name, scale.name, quarter, columns, divide),
                form="BitNet ternary",
                native=native,
            )
        )
