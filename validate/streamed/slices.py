"""Vocabulary tables of an MLX model, cast or unpacked a slice at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from quant.calibrate.bounds import TABLE_BYTES
from validate.streamed.bounds import SLICE_BYTES
from validate.streamed.stages import Stages, blocks_of


@dataclass(frozen=True)
class Table:
    """A table as it is stored: plain or packed, and not read yet."""

    parts: Mapping[str, Any]
    """weight, and of a packed one scales and perhaps biases."""
    packing: Mapping[str, Any]
    """group_size, bits and mode of a packed one."""
    words: int
    columns: int

    def rows(self, index: Any) -> Any:
        """Rows in float32, by ids or a slice."""
        mx: Any = import_module("mlx.core")
        found = {name: value[index] for name, value in self.parts.items()}
        if not self.packing:
            return found["weight"].astype(mx.float32)
        scales = {k: _cast(v) for k, v in found.items() if k != "weight"}
        return mx.dequantize(found["weight"], **scales, **self.packing, dtype=mx.float32)

    @cached_property
    def slices(self) -> list[tuple[slice, Any]]:
        """The table in slices, each made once for all who multiply by it."""
        step = max(1, SLICE_BYTES // (4 * self.columns))
        spans = [slice(at, min(self.words, at + step)) for at in range(0, self.words, step)]
        return [(span, self.rows(span)) for span in spans]


def large_tables(model: Any, *, dense: bool) -> dict[str, Table]:
    """The large embeddings and projections outside the blocks of a model as loaded, by path.

    Packed ones only where they are to be ``dense``: their own kernels unpack as they go.
    """
    nn: Any = import_module("mlx.nn")
    plain, packed = (nn.Embedding, nn.Linear), (nn.QuantizedEmbedding, nn.QuantizedLinear)
    inside = tuple(f"{path}." for path, _ in blocks_of(model))
    found = {}
    for path, module in model.named_modules():
        if path.startswith(inside) or type(module) not in (plain + packed if dense else plain):
            continue
        names = [n for n in ("weight", "scales", "biases") if module.get(n) is not None]
        parts = {name: module[name] for name in names}
        packing: dict[str, Any] = {}
        words, columns = parts["weight"].shape
        if "scales" in parts:
            packing = {n: getattr(module, n) for n in ("group_size", "bits", "mode")}
            columns = columns * 32 // module.bits
        if 4 * words * columns > TABLE_BYTES:
            found[path] = Table(parts, packing, words, columns)
    return found


def use_tables(model: Any, tables: Mapping[str, Table], stages: Stages) -> None:
    """Let the modules of a model in float32 compute from their ``tables``, noted in ``stages``."""
    nn: Any = import_module("mlx.nn")

    def project(table: Table, x: Any, bias: Any) -> Any:
        mx: Any = import_module("mlx.core")
        parts = []
        for number, (span, rows) in enumerate(table.slices):
            part = x @ rows.T if bias is None else mx.addmm(bias[span], x, rows.T)
            stages.slice(number, part)
            parts.append(part)
        return mx.concatenate(parts, axis=-1)

    class Embedding(nn.Embedding):  # type: ignore[misc]
        def __call__(self, ids: Any) -> Any:
            return self._table.rows(ids)

        def as_linear(self, x: Any) -> Any:
            return project(self._table, x, None)

    class Linear(nn.Linear):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            return project(self._table, x, self.get("bias"))

    modules = dict(model.named_modules())
    for path, table in tables.items():
        module = modules[path]
        module._table = table
        module.__class__ = Embedding if isinstance(module, nn.Embedding) else Linear


def _cast(values: Any) -> Any:
    mx: Any = import_module("mlx.core")
    return values.astype(mx.float32) if mx.issubdtype(values.dtype, mx.floating) else values
