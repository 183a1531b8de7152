"""Whether an adapter fits a release, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arch_maps.dtypes import FLOAT_CODES
from converter.adapter.model import Piece, Update
from converter.adapter.read import Adapter
from converter.source import Source


def shape_problems(
    source: Source,
    adapter: Adapter,
    pieces: Mapping[str, Iterable[Piece]],
    whole: Mapping[str, str],
) -> list[str]:
    """One line for each tensor of the adapter that does not fit what it adapts."""
    have = adapter.header.tensors
    problems: dict[str, None] = {}
    for tensor, own in whole.items():
        if have[own].shape != source.tensors[tensor].shape:
            problems[
                f"adapter: {own} is {list(have[own].shape)}, but {tensor} of the release is "
                f"{list(source.tensors[tensor].shape)}"
            ] = None
    sizes: dict[str, tuple[Update, int, int]] = {}
    for tensor, found in pieces.items():
        shape = source.tensors[tensor].shape
        for piece in found:
            update = piece.update
            if len(shape) != 2:
                problems[f"adapter: {update.module}: adapts {tensor}, which is no matrix"] = None
                continue
            rows = piece.first + piece.stop - piece.start
            known = sizes.get(update.up.name, (update, 0, 0))[1]
            sizes[update.up.name] = (update, max(rows, known), int(shape[1]))
    for update, rows, columns in sizes.values():
        lead = () if update.experts is None else (update.experts,)
        for factor, shape in (
            (update.up, (rows, update.rank)),
            (update.down, (update.rank, columns)),
        ):
            stored = lead + (shape[::-1] if factor.transposed else shape)
            if have[factor.name].shape != stored:
                problems[
                    f"adapter: {factor.name} is {list(have[factor.name].shape)}, but rank "
                    f"{update.rank} on this release makes it {list(stored)}"
                ] = None
        if update.magnitude is not None:
            size = columns if update.by_column else rows
            if have[update.magnitude].shape not in ((size,), (1, size), (size, 1)):
                problems[
                    f"adapter: {update.magnitude} is {list(have[update.magnitude].shape)}, not "
                    f"{size} magnitudes"
                ] = None
    for tensor in {*pieces, *whole}:
        if source.tensors[tensor].dtype not in FLOAT_CODES:
            dtype = source.tensors[tensor].dtype
            problems[f"adapter: adapts {tensor}, which is {dtype} and no plain float"] = None
    for name, info in have.items():
        if info.dtype not in FLOAT_CODES:
            problems[f"adapter: {name} is {info.dtype}; floats are expected"] = None
    return list(problems)


def summary(adapter: Adapter, updates: Sequence[Update], whole: Mapping[str, str]) -> str:
    """What plans, manifests and cards say of a fused adapter, in one sentence."""
    parts = []
    if updates:
        kind = "DoRA" if any(update.magnitude for update in updates) else "LoRA"
        low, high = (pick(update.rank for update in updates) for pick in (min, max))
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        parts.append(f"{kind} of {rank} on {len(updates)} matrices")
    if whole:
        parts.append(f"{len(whole)} whole tensors")
    base = adapter.record()["base_model"]
    trained = f", trained on {base}" if base else ""
    what = " and ".join(parts)
    return f"the adapter {adapter.name} ({what}{trained}) is fused into the weights"


def base_note(adapter: Adapter, origin: Mapping[str, Any], name: str) -> list[str]:
    """A note where the adapter was trained on a model that is called otherwise."""
    base = adapter.record()["base_model"]
    known = str(origin.get("repo") or name)
    if base is None or base == known or base.rpartition("/")[2] == known.rpartition("/")[2]:
        return []
    return [f"the adapter says it was trained on {base}; it is fused into {known}"]
