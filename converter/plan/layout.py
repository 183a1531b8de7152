"""Where every stored tensor lies: shard files, their headers, and byte offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from converter.plan.canonical import compact, listed, quoted
from converter.plan.model import Shard, StoredTensor

SHARD_BYTES = 5 << 30
"""Largest tensor data of one shard, as both runtimes' converters write them."""


def lay_out(
    tensors: Sequence[StoredTensor], *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Shards in name order of tensors that have no places; one over ``shard_bytes`` is alone."""
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=attrgetter("name")):
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


def _shard(file: str, group: Sequence[StoredTensor], metadata: Mapping[str, str]) -> Shard:
    entries = [f'"__metadata__":{compact(dict(metadata))}']
    at = 0
    for name, dtype, shape, _, _, size in group:  # as json writes it, in a third of the time
        stop = at + size
        entries.append(
            f'{quoted(name)}:{{"dtype":"{dtype}","shape":{listed(shape)},'
            f'"data_offsets":[{at},{stop}]}}'
        )
        at = stop
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format recommends
    header = len(text).to_bytes(8, "little") + text
    at = len(header)
    stored = []
    for name, dtype, shape, _, _, size in group:
        stored.append(StoredTensor(name, dtype, shape, file, at, size))
        at += size
    return Shard(file, header, at, tuple(stored))
