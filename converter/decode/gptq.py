"""GPTQ: ``qweight`` packed along the input, transposed; ``qzeros``, ``scales`` and ``g_idx``.

As AutoGPTQ, GPTQModel and optimum write it. Format ``gptq`` (the first) stores zero points less
one, modulo the width of a code; ``gptq_v2`` stores them as they are. ``desc_act`` lets ``g_idx``
scatter a group's columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from converter.decode.build import Builder, compiled, groups_for, integer, name_matcher
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block, CodingError
from quant.packing import unpack_rows
from quant.recipe import QuantSpec

BITS: Final = (2, 3, 4, 8)
_ZERO_OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Gptq(BlockCodec):
    """Rows of a matrix [out, in]: columns of what GPTQ stores."""

    module: str
    bits: int
    group: int
    out: int
    columns: int
    offset: int
    """What is added to stored zero points, within the width of a code."""
    symmetric: bool
    index: bool
    """Whether there is a ``g_idx``."""
    scattered: bool
    """Whether it may name any group for a column."""

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        found = None
        if codes:
            packed = raw.read_columns(f"{self.module}.qweight", start, stop)
            found = unpack.streams(packed, self.bits)
        scales = raw.read_columns(f"{self.module}.scales", start, stop).astype(np.float32)
        zeros = self._zeros(raw, start, stop)
        index = self._index(raw, scales.shape[0]) if self.index else None
        return Block(
            columns=self.columns,
            table=tables.unsigned(self.bits),
            codes=found,
            scales=np.ascontiguousarray(scales.T),
            zeros=zeros,
            group=self.group,
            index=index,
        )

    def _zeros(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        """(rows, groups); packed along the rows, as a bitstream per group."""
        # 32 codes fill whole words, whatever their width
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, self.out)
        packed = raw.read_columns(
            f"{self.module}.qzeros", first * self.bits // 32, last * self.bits // 32
        )
        stored = unpack_rows(packed.view(np.uint32), self.bits)
        zeros = stored[:, start - first : stop - first] + np.uint8(self.offset)
        zeros &= np.uint8((1 << self.bits) - 1)
        middle = 1 << (self.bits - 1)
        if self.symmetric and (zeros != middle).any():
            raise CodingError(f"zero points are not all {middle}, although config.json says sym")
        return np.ascontiguousarray(zeros.T).astype(np.float32)

    def _index(self, raw: RawReader, groups: int) -> np.ndarray | None:
        """The group of each column, None where they lie together."""
        index = raw.read_rows(f"{self.module}.g_idx", 0, self.columns)
        if not self.scattered:
            if not np.array_equal(index, np.arange(self.columns) // self.group):
                raise CodingError("g_idx scatters groups, although config.json says no desc_act")
            return None
        if index.min() < 0 or index.max() >= groups:
            raise CodingError(f"g_idx names groups outside of 0 to {groups - 1}")
        return index.astype(np.int32)


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every module with a ``qweight``."""
    format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if format not in _ZERO_OFFSETS or settings.get("pack_dtype", "int32") != "int32":
        build.problem(
            f"config.json: checkpoint_format {format!r} is laid out for one kernel; only gptq and "
            "gptq_v2 are decoded"
        )
        return
    overrides = settings.get("dynamic") or {}
    if not isinstance(overrides, dict):
        build.problem("config.json: dynamic must be an object")
        return
    patterns = [
        (text.startswith("-"), compiled(text.lstrip("+-:"), build, where="dynamic"), own)
        for text, own in overrides.items()
    ]
    ignored = name_matcher(
        settings.get("modules_to_not_convert"), build, where="modules_to_not_convert"
    )
    for module in build.with_ending(".qweight"):
        if build.stays_plain(module, ignored):
            continue
        merged = dict(settings)
        for minus, pattern, own in patterns:
            if pattern is not None and pattern.match(module):
                if minus:
                    build.problem(f"{module}: config.json leaves it unquantized (dynamic)")
                merged.update(own if isinstance(own, dict) else {})
        _add(merged, module, build, offset=_ZERO_OFFSETS[format])


def _add(settings: Mapping[str, Any], module: str, build: Builder, *, offset: int) -> None:
    bits, group = integer(settings, "bits"), integer(settings, "group_size")
    if bits not in BITS or group is None or not (group == -1 or 0 < group < 1 << 24):
        build.problem(
            f"{module}: config.json states {settings.get('bits')!r} bits in groups of "
            f"{settings.get('group_size')!r}, which GPTQ does not have"
        )
        return
    needed = f"{module}.qweight"
    weight = build.expect(needed, ("I32", "U32"), needed_by=module)
    if weight is None:
        return
    if len(weight.shape) != 2 or weight.shape[0] * 32 % bits:
        build.problem(f"{needed}: {list(weight.shape)} does not hold whole columns of {bits} bits")
        return
    columns, out = weight.shape[0] * 32 // bits, weight.shape[1]
    if out * bits % 32:
        build.problem(f"{needed}: zero points of {out} rows of {bits} bits fill no whole words")
        return
    group = columns if group == -1 else group
    groups = -(-columns // group)
    parts = [
        build.expect(f"{module}.scales", ("F16", "BF16", "F32"), (groups, out), needed_by=needed),
        build.expect(
            f"{module}.qzeros", ("I32", "U32"), (groups, out * bits // 32), needed_by=needed
        ),
    ]
    scattered = bool(settings.get("desc_act"))
    index = f"{module}.g_idx" in build.tensors
    if index or scattered:
        parts.append(build.expect(f"{module}.g_idx", ("I32", "I64"), (columns,), needed_by=needed))
    if None in parts:
        return
    symmetric = bool(settings.get("sym"))
    scattered = scattered and groups > 1
    size = groups_for(group, columns)
    native = None
    if not scattered and size is not None:
        native = Native(
            spec=QuantSpec.make("affine", bits, size),
            scales=parts[0].dtype if parts[0] else "",
            products=not symmetric,
        )
    form = f"GPTQ {bits}-bit, groups of {group}" + (", scattered by g_idx" if scattered else "")
    names = [f"{module}.{part}" for part in ("qweight", "scales", "qzeros")]
    build.add(
        Coded(
            name=f"{module}.weight",
            stored=(out, columns),
            reads=(*names, *([f"{module}.g_idx"] if index else [])),
            codec=Gptq(module, bits, group, out, columns, offset, symmetric, index, scattered),
            form=form,
            native=native,
        )
    )
