"""The weights that an output really holds, as the torch checkpoint that they amount to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from arch_maps.config import start
from arch_maps.facts import Facts
from arch_maps.ops import RowReader, evaluate, exact, factors
from arch_maps.registry import ArchMap
from converter.decode import DecodingReader, View, decoded
from converter.execute import Job, execute
from converter.execute.encode import encode
from converter.manifest import is_rotated
from converter.plan import Options, Plan
from converter.plan.back import build_back_plan
from converter.plan.match import find_map, match_release
from converter.scratch import scratch
from converter.sidecars import copy_sidecars, list_sidecars, write_json
from converter.source import Source, open_folder


@dataclass(frozen=True, kw_only=True)
class Backwards:
    """How the tensors of a torch checkpoint come from an output and its release."""

    plan: Plan
    checkpoint: Source
    release: Source
    merged: Source
    """The output's tensors, decoded, and those of the release that go along."""
    view: View
    carried: frozenset[str]

    @contextmanager
    def reader(self) -> Iterator[RowReader]:
        """Rows of the tensors that ``plan`` starts from."""
        with self.checkpoint.open() as mine, self.release.open() as theirs:
            yield _Beside(DecodingReader(mine, self.view), theirs, self.carried)


def backwards(out: Path, source: Path, *, arch: ArchMap | None = None) -> Backwards:
    """The way back from the MLX checkpoint ``out`` to the names of the release in ``source``."""
    checkpoint = open_folder(out, allow_mlx=True)
    view = decoded(checkpoint, dtype="F32")
    logical = view.source
    arch = arch or find_map(logical.config)
    release = open_folder(source)
    match = match_release(release, arch)
    beside = [drop.name for drop in match.drops if drop.same_as is None]
    beside += [leaf.name for rule in match.rules for leaf in factors(rule.expr)]
    carried = {name: release.tensors[name] for name in beside}
    merged = replace(logical, tensors={**logical.tensors, **carried})
    plan = build_back_plan(
        merged,
        arch,
        Options(target="torch", dtype="float32"),
        torch_config=start(release.config),
        carried=carried,
        rotated=is_rotated(out),  # so that the gate judges the fold, too
    )
    return Backwards(
        plan=plan,
        checkpoint=checkpoint,
        release=release,
        merged=merged,
        view=view,
        carried=frozenset(carried),
    )


@contextmanager
def written_weights(
    out: Path,
    source: Path,
    *,
    arch: ArchMap | None = None,
    workers: int = 2,
    place: Path | None = None,
) -> Iterator[Path]:
    """A torch checkpoint of the weights that ``out`` holds, as float32, under the release's names.

    It lies hidden beside ``out``, or in ``place``, and goes with the context.
    """
    back = backwards(out, source, arch=arch)
    with scratch("reference", out, parent=place) as folder:
        with back.reader() as reader:
            job = Job(back.plan, folder)
            execute([job], back.merged, reader=reader, stamp={}, workers=workers)
        write_json(folder / "model.safetensors.index.json", back.plan.index())
        _beside_weights(back, source, folder)
        yield folder


@contextmanager
def unwritten_weights(
    out: Path, source: Path, *, arch: ArchMap | None = None
) -> Iterator[tuple[Path, PlannedReader]]:
    """The same without its weight files: a folder of all else, and what gives rows of the weights.

    The values are those that ``written_weights`` writes, to the bit.
    """
    back = backwards(out, source, arch=arch)
    with scratch("reference", out) as folder, back.reader() as reader:
        _beside_weights(back, source, folder)
        yield folder, PlannedReader(back.plan, reader)


class PlannedReader:
    """Rows of a plan's parameters, made when they are asked for."""

    def __init__(self, plan: Plan, reader: RowReader) -> None:
        """``reader`` gives what the plan starts from; no parameter of ``plan`` is quantized."""
        self._outputs = {out.rule.target: out for out in plan.outputs}
        self._reader = reader

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: tuple(map(int, out.expr.shape)) for name, out in self._outputs.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """safetensors dtype code by name."""
        return {name: out.dtype for name, out in self._outputs.items()}

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a parameter as the plan stores it."""
        out = self._outputs[name]
        rows = evaluate(out.expr, self._reader, start, stop)
        ((_, _, array),) = encode(out, rows, start)
        return array


def as_released(out: Path, plan: Plan | None, arch: ArchMap | None) -> bool:
    """Whether the weights of ``out`` are those of the release, as far as its ``plan`` tells."""
    if plan is not None:
        return all(made.quant is None and exact(made.expr) for made in plan.outputs)
    view = decoded(open_folder(out, allow_mlx=True), dtype="F32")
    arch = arch or find_map(view.source.config)
    return not view.coded and not is_rotated(out) and not _arithmetic(arch, view.source.config)


def _beside_weights(back: Backwards, source: Path, folder: Path) -> None:
    write_json(folder / "config.json", back.plan.config)
    copy_sidecars(source, list_sidecars(source), folder)


def _arithmetic(arch: ArchMap, config: dict[str, Any]) -> bool:
    tensors = arch.expand(Facts(config), arch.layouts[0])
    return not all(exact(rule.expr) for rule in tensors.rules)


@dataclass(frozen=True, slots=True)
class _Beside:
    """Rows of the checkpoint, and of the release for what the checkpoint no longer holds."""

    checkpoint: RowReader
    release: RowReader
    lost: frozenset[str]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor."""
        reader = self.release if name in self.lost else self.checkpoint
        return reader.read_rows(name, start, stop)
