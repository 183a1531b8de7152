"""Quantized tensors held against the release's weights, group by group.

What the runtime computes from codes is judged elsewhere, and so is what quantizing loses; neither
tells a block of wrong codes from a loss. Here the codes of a group are asked whether they are those
of its weights. Taken from the middle of the range that its codes span, the weights of a group and
the values of its codes are two vectors, and their cosine says so whatever the step and the method:
near 1 for codes that are the nearest, lower where a method moves codes to make up for other errors
or gives up outliers, about 0 for codes of other weights, and its negative for codes that are
mirrored (q for n - q, or with their signs turned). A negative cosine means that the weights are
nearer to the mirrored codes than to those written, which no method does to a group that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from arch_maps.ops import evaluate
from arch_maps.registry import ArchMap
from arch_maps.rules import Rule
from converter.decode import Coded, DecodingReader, decoded
from converter.decode.mlx import spec_of
from converter.errors import PlanError
from converter.execute.units import units_of
from converter.manifest import is_rotated
from converter.plan import rotate
from converter.plan.match import find_map, match_release
from converter.plan.model import Output
from converter.source import Source, open_folder
from quant.recipe import QuantSpec
from validate.checks import CaseResult, Check

NAME: Final = "codes"
_UNLIKE: Final = 0.5
"""Cosine below which a group is unlike its weights."""
_FEW: Final = 0.1
"""Share of unlike groups up to which a tensor's codes are by and large those of its weights; with
more, a single group proves nothing: methods that make up for errors fill empty groups with them."""
_MIRRORED: Final = -0.9
"""A cosine that no method and no chance gives: then a group is judged in any company."""
_MOST: Final = 0.5
"""Share of unlike groups from which on the codes are those of other weights."""
_BITS: Final = 3
"""Fewest bits with which single groups are judged: of two, a method may turn a group around."""
_COUNTS: Final = 1e-3
"""A group counts from this share of the mean group's sum of squares on."""
_SHOWN: Final = 4
_KEPT: Final = 1 << 16


@dataclass(slots=True)
class _Tally:
    """What was seen of one tensor's groups."""

    apart: bool
    """Whether there are bits enough to judge single groups."""
    groups: int = 0
    unlike: int = 0
    squares: float = 0.0
    error: float = 0.0
    turned: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(row, group, sum of squares, cosine) of groups with a negative cosine."""

    def add(self, first_row: int, alike: Any, size: Any, error: float) -> None:
        """Count the groups of some rows, (rows, groups) each."""
        self.groups += alike.size
        self.unlike += int((alike < _UNLIKE).sum())
        self.squares += float(size.sum(dtype=np.float64))
        self.error += error
        for row, index in np.argwhere(alike < 0)[: _KEPT - len(self.turned)]:
            place = first_row + int(row), int(index)
            self.turned.append((*place, float(size[row, index]), float(alike[row, index])))

    @property
    def loss(self) -> float:
        """Squared error over the sum of squares, all taken from the middles of the groups."""
        return self.error / self.squares if self.squares else 0.0

    def wrong(self) -> list[tuple[int, int]]:
        """(row, group) of the groups that count and whose codes are mirrored."""
        if not self.apart:
            return []
        least = _COUNTS * self.squares / self.groups
        most = _MIRRORED if self.unlike > _FEW * self.groups else 0.0
        return [(r, i) for r, i, size, cosine in self.turned if size >= least and cosine <= most]

    @property
    def other(self) -> bool:
        """Whether the codes are those of other weights altogether."""
        return self.unlike > _MOST * self.groups


def codes_check(out: Path, source: Path, *, arch: ArchMap | None = None) -> list[Check]:
    """The row on the codes of ``out`` beside the unquantized release in ``source``.

    Empty where nothing is packed, or where the release cannot be matched with a map. Reads both
    once, in bounded pieces.
    """
    checkpoint = open_folder(out, allow_mlx=True)
    view = decoded(checkpoint, dtype="F32")
    if not view.coded:
        return []
    try:
        release = open_folder(source)
        rules = _rules(release, arch, rotated=is_rotated(out))
    except PlanError:  # what is wrong with the release is told elsewhere
        return []
    outputs, coded = [], []
    for rule in rules:
        found = _coded(view.coded, rule.target)
        if found is not None and found.shape == tuple(map(int, rule.expr.shape)):
            outputs.append(Output(rule, "F32", None, {}))
            coded.append(found)
    tallies = [_Tally(spec_of(one).bits >= _BITS) for one in coded]
    with checkpoint.open() as mine, release.open() as theirs:
        reader = DecodingReader(mine, view)
        for unit in units_of(release, outputs):
            one = coded[unit.output]
            wanted = evaluate(outputs[unit.output].expr, theirs, unit.start, unit.stop)
            values = reader.read_rows(one.name, unit.start, unit.stop)
            middle = _middle(mine, one, unit.start, unit.stop)
            first = unit.start * (values[0].size // values.shape[-1])
            tallies[unit.output].add(first, *_compare(wanted, values, middle))
    named = {one.name: tally for one, tally in zip(coded, tallies, strict=True)}
    return [_row(named, left=len(view.coded) - len(coded))]


def _rules(release: Source, arch: ArchMap | None, *, rotated: bool) -> Sequence[Rule]:
    """What the map makes of the release; PlanError where there is none, or it does not fit."""
    match = match_release(release, arch or find_map(release.config))
    return rotate.values(match.rules, match.values)[0] if rotated else match.rules


def _coded(coded: Mapping[str, Coded], target: str) -> Coded | None:
    """The packed tensor for a rule's target; text-only converters leave the outer prefix out."""
    names = (target, target.removeprefix("language_model."), f"language_model.{target}")
    return next((coded[name] for name in names if name in coded), None)


def _compare(wanted: Any, values: Any, middle: Any) -> tuple[Any, Any, float]:
    from quant.kernels_compare import compare_groups

    columns = values.shape[-1]
    w = np.ascontiguousarray(wanted, np.float32).reshape(-1, columns)
    v = np.ascontiguousarray(values, np.float32).reshape(-1, columns)
    alike, size = np.empty_like(middle), np.empty_like(middle)
    error = compare_groups(w, v, middle, alike, size)
    return alike, size, error


def _middle(reader: Any, one: Coded, start: int, stop: int) -> Any:
    """The value in the middle of each group's codes, (rows, groups) float32."""
    module = one.name.removesuffix(".weight")
    scales = np.asarray(reader.read_rows(f"{module}.scales", start, stop))
    flat = scales.reshape(-1, scales.shape[-1])
    spec: QuantSpec = spec_of(one)
    if spec.mode != "affine":
        return np.zeros(flat.shape, np.float32)  # codes come with either sign
    biases = np.asarray(reader.read_rows(f"{module}.biases", start, stop)).reshape(flat.shape)
    half = np.float32((2**spec.bits - 1) / 2)
    return biases.astype(np.float32) + half * flat.astype(np.float32)


def _row(tallies: Mapping[str, _Tally], *, left: int) -> Check:
    wrong = {name: found for name, tally in tallies.items() if (found := tally.wrong())}
    other = [name for name, tally in tallies.items() if tally.other]
    groups = sum(tally.groups for tally in tallies.values())
    told = [*_blocks(wrong), *(f"{name} holds codes of other weights" for name in other)]
    value = float(sum(map(len, wrong.values())) + sum(tallies[name].groups for name in other))
    note = "; ".join(told[:_SHOWN])
    note += f"; and {len(told) - _SHOWN} more like these" if len(told) > _SHOWN else ""
    if left:
        note += f"{'; ' if note else ''}{left} packed tensors have no counterpart in the map"
    losses = sorted((tally.loss, name) for name, tally in tallies.items() if tally.groups)
    metrics: dict[str, float | int | str] = {"tensors": len(tallies), "groups": groups}
    if losses:
        metrics |= {"loss_median": losses[len(losses) // 2][0], "loss_most": losses[-1][0]}
        metrics |= {"most_of": losses[-1][1]}
    return Check(
        name=NAME,
        modality="weights",
        value=value,
        threshold=0.0,
        verdict="fail" if value else "pass" if groups else "info",
        note=note or "every group's codes are those of the release's weights",
        metrics=metrics,
        cases=tuple(CaseResult(name, loss) for loss, name in losses[: -1 - _SHOWN : -1]),
    )


def _blocks(wrong: Mapping[str, list[tuple[int, int]]]) -> Iterator[str]:
    for name, found in wrong.items():
        row, index = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{name}: the codes of row {row}, group {index}{more} are not those of its weights"
