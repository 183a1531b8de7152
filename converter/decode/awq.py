"""AWQ: ``qweight`` [in, out/8] with the eight nibbles of a word interleaved, transposed.

As AutoAWQ's GEMM layout has it; value = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter.decode.build import Builder, groups_for, integer, name_matcher
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class Awq(BlockCodec):
    """Rows of a matrix [out, in]: columns of what AWQ stores."""

    module: str
    group: int
    columns: int

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        scales = raw.read_columns(f"{self.module}.scales", start, stop)
        return Block(
            columns=self.columns,
            table=tables.unsigned(4),
            codes=self._codes(raw, "qweight", start, stop) if codes else None,
            scales=unpack.transposed(scales.astype(np.float32)),
            zeros=self._codes(raw, "qzeros", start, stop).astype(np.float32),
            group=self.group,
        )

    def _codes(self, raw: RawReader, role: str, start: int, stop: int) -> np.ndarray:
        first, last = start // 8, -(-stop // 8)
        words = raw.read_columns(f"{self.module}.{role}", first, last)
        return unpack.awq(words)[start - 8 * first : stop - 8 * first]


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every module with a ``qweight``."""
    version, bits = settings.get("version", "gemm"), integer(settings, "bits", 4)
    if str(version).lower() != "gemm" or bits != 4:
        build.problem(
            f"config.json: AWQ version {version!r} with {settings.get('bits')!r} bits is not "
            "decoded; only version gemm with 4 bits is"
        )
        return
    group = integer(settings, "group_size", integer(settings, "q_group_size", 128))
    if group is None or not (group == -1 or 0 < group < 1 << 24):
        build.problem(f"config.json: group_size {settings.get('group_size')!r} is no group size")
        return
    ignored = name_matcher(
        settings.get("modules_to_not_convert"), build, where="modules_to_not_convert"
    )
    for module in build.with_ending(".qweight"):
        if not build.stays_plain(module, ignored):
            _add(module, group, build)


def _add(module: str, group: int, build: Builder) -> None:
    name = f"{module}.qweight"
    weight = build.expect(name, ("I32", "U32"), needed_by=module)
    if weight is None:
        return
    if len(weight.shape) != 2:
        build.problem(f"{name}: {list(weight.shape)} is no matrix")
        return
    columns, words = weight.shape
    group = columns if group == -1 else group
    if columns % group:
        build.problem(f"{name}: {columns} columns do not divide into groups of {group}")
        return
    groups = columns // group
    scales = build.expect(
        f"{module}.scales", ("F16", "BF16", "F32"), (groups, 8 * words), needed_by=name
    )
    zeros = build.expect(f"{module}.qzeros", ("I32", "U32"), (groups, words), needed_by=name)
    if scales is None or zeros is None:
        return
    size = groups_for(group, columns)
    native = None
    if size is not None:
        spec = QuantSpec.make("affine", 4, size)
        native = Native(spec=spec, scales=scales.dtype, products=True)
    build.add(
        Coded(
            name=f"{module}.weight",
            stored=(8 * words, columns),
            reads=(name, scales.name, zeros.name),
            codec=Awq(module, group, columns),
            form=f"AWQ 4-bit, groups of {group}",
            native=native,
        )
    )
