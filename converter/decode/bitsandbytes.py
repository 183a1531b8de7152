"""bitsandbytes: nf4 and fp4 in blocks over the flattened matrix, and int8 with a scale per row.

4-bit: ``weight`` is a column of bytes, the high nibble first; ``absmax`` scales each block and may
be quantized itself (``nested_*``). The logical shape lies in a JSON tensor, so it is taken from
the map and checked against that. int8: value = weight * SCB / 127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from converter.decode.build import Builder, groups_for
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from quant.decode import tables, unpack
from quant.decode.block import Block, CodingError
from quant.recipe import QuantSpec

_STATE: Final = ".quant_state.bitsandbytes__"
_LONGEST_STATE: Final = 4096
_BLOCKS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 32)
"""Block sizes, the usual one first: what is quantized leaves open which of them it was only where
it is a single block."""


@dataclass(frozen=True, slots=True)
class FourBit(BlockCodec):
    """Rows of a matrix whose blocks run on from row to row."""

    name: str
    state: str
    shape: tuple[int, int]
    size: int
    """Elements of a block."""
    state_bytes: int
    nested: int
    """Block scales that share one of their own; 0 where they are plain."""

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)`` as one long row, or as rows where blocks do not cross them."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        found = None
        if codes:
            stored = raw.read_rows(self.name, first // 2, -(-last // 2))
            found = unpack.nibbles_high_first(stored)[first % 2 : first % 2 + last - first]
        low, high = first // self.size, -(-last // self.size)
        scales = self._absmax(raw, low, high)
        table = raw.read_rows(f"{self.name}.quant_map", 0, 16).astype(np.float32)
        if columns % self.size == 0:
            return Block(
                columns=columns,
                table=table,
                codes=None if found is None else found.reshape(-1, columns),
                scales=scales.reshape(stop - start, -1),
                group=self.size,
            )
        return Block(
            columns=last - first,
            table=table,
            codes=None if found is None else found.reshape(1, -1),
            scales=scales.reshape(1, -1),
            group=self.size,
            index=(np.arange(first, last) // self.size - low).astype(np.int32),
        )

    def _absmax(self, raw: RawReader, low: int, high: int) -> np.ndarray:
        state = self._state(raw)
        stored = raw.read_rows(f"{self.name}.absmax", low, high)
        if not self.nested:
            return stored.astype(np.float32)
        table = raw.read_rows(f"{self.name}.nested_quant_map", 0, 256).astype(np.float32)
        above = raw.read_rows(
            f"{self.name}.nested_absmax", low // self.nested, -(-high // self.nested)
        ).astype(np.float32)
        factors = above[np.arange(low, high) // self.nested - low // self.nested]
        scales: np.ndarray = table[stored] * factors
        return scales + np.float32(state["nested_offset"])

    def _state(self, raw: RawReader) -> dict[str, Any]:
        """What the matrix says of itself; CodingError where the plan says otherwise."""
        text = raw.read_rows(self.state, 0, self.state_bytes)
        try:
            state = json.loads(bytes(text).decode("utf-8"))
            same = (
                tuple(state["shape"]) == self.shape
                and state["blocksize"] == self.size
                and (not self.nested or state["nested_blocksize"] == self.nested)
            )
            offset = float(state["nested_offset"]) if self.nested else 0.0
        except (ValueError, KeyError, TypeError) as error:
            raise CodingError(f"{self.state} is damaged: {error}") from error
        if not same or not math.isfinite(offset):
            raise CodingError(f"{self.state} contradicts the headers: {state}")
        return {"nested_offset": offset}


@dataclass(frozen=True, slots=True)
class Int8(BlockCodec):
    """Rows of signed bytes with a scale each."""

    name: str
    scale: str
    columns: int

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        found = raw.read_rows(self.name, start, stop).view(np.uint8) if codes else None
        scales = raw.read_rows(self.scale, start, stop).astype(np.float32) / np.float32(127)
        return Block(
            columns=self.columns,
            table=tables.offset(8),
            codes=None if found is None else found ^ np.uint8(0x80),
            scales=scales.reshape(-1, 1),
            group=self.columns,
        )


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every matrix with a quantization state or with SCB."""
    for kind in ("nf4", "fp4"):
        for name in build.with_ending(f"{_STATE}{kind}"):
            _add_four_bit(name, f"{name}{_STATE}{kind}", kind, build)
    for module in build.with_ending(".SCB"):
        _add_int8(module, build)
    build.drop_ending({".weight_format": "says that int8 rows are laid out plainly"})


def _add_four_bit(name: str, state: str, kind: str, build: Builder) -> None:
    weight = build.expect(name, ("U8",), needed_by=state)
    absmax = build.expect(f"{name}.absmax", ("F32", "U8"), needed_by=name)
    table = build.expect(f"{name}.quant_map", ("F32",), (16,), needed_by=name)
    if weight is None or absmax is None or table is None:
        return
    count = 2 * weight.nbytes
    shapes = [s for s in build.shapes().get(name, ()) if math.prod(s) in (count, count - 1)]
    shape = next((s for s in shapes if len(s) == 2), None)
    if shape is None or len(absmax.shape) != 1:
        build.problem(f"{name}: {count} packed elements are no matrix that config.json makes it")
        return
    elements, blocks = math.prod(shape), absmax.shape[0]
    size = next((b for b in _BLOCKS if -(-elements // b) == blocks), None)
    parts = [name, absmax.name, table.name, state]
    nested = 0
    if absmax.dtype == "U8":
        above = build.expect(f"{name}.nested_absmax", ("F32",), needed_by=name)
        inner = build.expect(f"{name}.nested_quant_map", ("F32",), (256,), needed_by=name)
        if above is None or inner is None:
            return
        parts += [above.name, inner.name]
        nested = 256
        if above.shape != (-(-blocks // nested),):
            size = None
    text = build.expect(state, ("U8",), needed_by=name)
    if size is None or text is None or len(text.shape) != 1 or text.nbytes > _LONGEST_STATE:
        build.problem(f"{name}: {blocks} block scales do not fit {elements} elements")
        return
    build.add(
        Coded(
            name=name,
            stored=(int(shape[0]), int(shape[1])),
            reads=tuple(parts),
            codec=FourBit(name, state, (int(shape[0]), int(shape[1])), size, text.nbytes, nested),
            form=f"bitsandbytes {kind}, blocks of {size}{', nested' if nested else ''}",
        )
    )


def _add_int8(module: str, build: Builder) -> None:
    name = f"{module}.weight"
    weight = build.expect(name, ("I8",), needed_by=f"{module}.SCB")
    if weight is None:
        return
    if len(weight.shape) != 2:
        build.problem(f"{name}: {list(weight.shape)} is no matrix")
        return
    out, columns = weight.shape
    scale = build.expect(f"{module}.SCB", ("F32", "F16", "BF16"), (out,), needed_by=name)
    if scale is None:
        return
    size = groups_for(columns, columns)
    native = None
    if size is not None:  # SCB / 127 is a float32 quotient
        native = Native(spec=QuantSpec.make("affine", 8, size), scales="F32")
    build.add(
        Coded(
            name=name,
            stored=(out, columns),
            reads=(name, scale.name),
            codec=Int8(name, scale.name, columns),
            form="bitsandbytes int8, a scale per row",
            native=native,
        )
    )
