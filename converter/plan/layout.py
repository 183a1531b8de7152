"""Where every stored tensor lies: shard files, their headers, and byte offsets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arch_maps.dtypes import itemsize
from arch_maps.ops import Shape
from converter.plan.model import Shard, StoredTensor

SHARD_BYTES = 5 << 30
"""Largest tensor data of one shard, as both runtimes' converters write them."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor that has no place yet."""

    name: str
    dtype: str
    shape: Shape
    nbytes: int = field(init=False)
    """Bytes of the tensor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", math.prod(self.shape) * itemsize(self.dtype))


def lay_out(
    tensors: Sequence[Pending], *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Shards in name order; a tensor larger than ``shard_bytes`` gets a shard of its own."""
    groups: list[list[Pending]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    count = len(groups)
    names = ["model.safetensors"] if count == 1 else _numbered(count)
    return tuple(_shard(file, group, metadata) for file, group in zip(names, groups, strict=True))


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _shard(file: str, group: Sequence[Pending], metadata: Mapping[str, str]) -> Shard:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in group:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format recommends
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    stored = []
    for tensor in group:
        stored.append(StoredTensor(tensor.name, tensor.dtype, tensor.shape, file, start))
        start += tensor.nbytes
    return Shard(file, header, start, tuple(stored))
