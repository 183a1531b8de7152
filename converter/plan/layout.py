"""Where every stored tensor lies: shard files, their headers, and byte offsets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from arch_maps.dtypes import itemsize
from arch_maps.ops import Shape
from converter.plan.model import Shard, StoredTensor

SHARD_BYTES = 5 << 30
"""Largest tensor data of one shard, as both runtimes' converters write them."""


class Pending(NamedTuple):
    """A tensor that has no place yet; a tuple, since a large plan makes them by the 100,000."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * itemsize(self.dtype)


def lay_out(
    tensors: Sequence[Pending], *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Shards in name order; a tensor larger than ``shard_bytes`` gets a shard of its own."""
    groups: list[list[tuple[Pending, int]]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=attrgetter("name")):
        size = tensor.nbytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, size))
        filled += size
    count = len(groups)
    names = ["model.safetensors"] if count == 1 else _numbered(count)
    return tuple(_shard(file, group, metadata) for file, group in zip(names, groups, strict=True))


def _numbered(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _shard(file: str, group: Sequence[tuple[Pending, int]], metadata: Mapping[str, str]) -> Shard:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    starts = []
    for tensor, size in group:
        starts.append(at)
        at += size
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (starts[-1], at),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format recommends
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    stored = tuple(
        StoredTensor(tensor.name, tensor.dtype, tensor.shape, file, start + own, size)
        for (tensor, size), own in zip(group, starts, strict=True)
    )
    return Shard(file, header, start + at, stored)
