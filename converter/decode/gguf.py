"""GGUF: blocks of GGML's types, under the release's names already (``converter.source.gguf``).

What llama.cpp's converter did to values is undone here: rows of rotated halves are put in order,
what was added to norms is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converter.decode.build import Builder
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from converter.source import Stored
from quant.decode.block import Block
from quant.decode.ggml import BY_NAME, blocks_of
from quant.floats import cast


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a tensor in the release's order."""

    name: str
    count: int
    head: int
    """Rows of a head, whose two halves the file interleaves; 0 where it does not."""

    def read(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` as stored."""
        if not self.head:
            return raw.read_rows(self.name, start, stop)
        first = start // self.head * self.head
        last = min(-(-stop // self.head) * self.head, self.count)
        head, row = np.divmod(np.arange(start, stop), self.head)
        half, place = np.divmod(row, self.head // 2)
        order = head * self.head + 2 * place + half - first
        return np.ascontiguousarray(raw.read_rows(self.name, first, last)[order])


@dataclass(frozen=True, slots=True)
class Blocks(BlockCodec):
    """Rows of blocks."""

    rows: _Rows
    kind: str

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        found = blocks_of(BY_NAME[self.kind], self.rows.read(raw, start, stop))
        return found if codes else replace(found, codes=None)


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows of plain numbers, ``offset`` taken off in float32."""

    rows: _Rows
    offset: float

    def values(self, raw: RawReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """Rows ``[start, stop)`` in ``dtype``."""
        found = self.rows.read(raw, start, stop)
        if self.offset:
            found = found.astype(np.float32) - np.float32(self.offset)
        return cast(found, dtype)


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every tensor whose bytes are not already the release's."""
    if not build.gguf:
        build.problem("config.json: says gguf, but the weights are in no GGUF file")
    for name, own in build.gguf.items():
        if name in build.gguf_drops:
            build.drop(name, build.gguf_drops[name])
        elif name in build.tensors:
            _add(name, own, build)


def _add(name: str, own: Stored, build: Builder) -> None:
    kind = BY_NAME[own.kind]
    if not kind.decoded:
        known = ", ".join(kind.name for kind in BY_NAME.values() if kind.decoded)
        build.problem(f"{own.inside}: is {kind.name}, which is not decoded; only {known} are")
        return
    rows = _Rows(name, own.shape[0], own.head_rows)
    done = ", rotary rows put in order" if own.head_rows else ""
    if kind.plain:
        if not own.head_rows and not own.offset:
            return
        done += f", {own.offset:g} taken off" if own.offset else ""
        form = f"GGUF {kind.name}{done}"
        coded = Coded(
            name=name, stored=own.shape, reads=(name,), codec=Plain(rows, own.offset), form=form
        )
        build.add(coded, dtype="F32" if own.offset else kind.plain)
        return
    if own.offset:
        build.problem(f"{own.inside}: is {kind.name}, where a norm in plain numbers is expected")
        return
    native = None
    if kind.native is not None:
        spec, scales = kind.native
        native = Native(spec=spec, scales=scales)
    build.add(
        Coded(
            name=name,
            stored=own.shape,
            reads=(name,),
            codec=Blocks(rows, own.kind),
            form=f"GGUF {kind.name}",
            native=native,
        )
    )
