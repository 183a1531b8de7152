"""Allocation: which spec each matrix gets, so that the whole has a size and the least loss.

A multiple-choice knapsack: one spec of several for each matrix, their bytes within a budget, the
sum of their losses least. It is solved on whole numbers by dynamic programming, so that the same
losses give the same choice everywhere; equals fall to the smaller spec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from quant.recipe import AFFINE_BITS, AFFINE_GROUP_SIZES, Method, QuantSpec

FLOOR_BITS: Final = 4
"""Least bits of heads, embeddings and what reads or writes a recurrent state."""
_LOSS_STEPS: Final = 1 << 40
_COLUMNS: Final = 20_000
"""Columns of the solver's table at least, and for each thousand choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The spec of each module, None where it stays plain, and what the choice rests on."""

    specs: Mapping[str, QuantSpec | None]
    base: QuantSpec
    """The spec of most weights: what config.json says of all modules without their own entry."""
    basis: str
    """Which losses: "weights" or "activations"."""
    losses: str
    """sha256 of the measured losses."""
    expected: float
    """Sum of the chosen losses; for "activations" an estimate of the mean KL in nats."""

    def to_json(self) -> dict[str, Any]:
        """What a plan records beside the spec of each output."""
        expected = float(f"{self.expected:.4g}")
        return {"basis": self.basis, "losses": self.losses, "expected": expected}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one matrix can be stored as: bytes and loss of each spec, in the order of ``specs``."""

    name: str
    elements: int
    specs: tuple[QuantSpec | None, ...]
    bytes: tuple[int, ...]
    losses: tuple[float, ...] = field(repr=False)


def candidates(method: Method, *, group_size: int | None = None) -> tuple[QuantSpec, ...]:
    """Every spec of a method that both stock runtimes load, or those of one group size."""
    sizes = AFFINE_GROUP_SIZES if group_size is None else (group_size,)
    specs = [QuantSpec("affine", bits, size, method) for bits in AFFINE_BITS for size in sizes]
    if group_size is None and method != "autoround":
        specs += [QuantSpec.make(mode, method=method) for mode in ("mxfp4", "nvfp4", "mxfp8")]
    return tuple(specs)


def solve(choices: Sequence[Choice], budget: int) -> list[int]:
    """The index of each choice's spec: bytes within ``budget``, the sum of losses least.

    The optimum where the bytes, over their greatest common divisor, fit a table of moderate size;
    else they are rounded up to a step of it, and what that leaves over is spent on the best single
    steps. ValueError where even the smallest specs exceed the budget.
    """
    least = sum(min(choice.bytes) for choice in choices)
    if least > budget:
        raise ValueError(f"at least {least} bytes are needed and {budget} are there")
    pruned = [_undominated(choice) for choice in choices]
    whole = _whole_losses(choices)
    extra = [[size - min(choice.bytes) for size in choice.bytes] for choice in choices]
    unit = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    room = min(budget - least, sum(map(max, extra)))
    step = unit * max(1, -(-room // (unit * max(_COLUMNS, _COLUMNS * len(choices) // 1000))))
    columns = room // step
    best = np.zeros(columns + 1, np.int64)
    taken = np.zeros((len(choices), columns + 1), np.uint8)
    for row, kept in enumerate(pruned):
        found = np.full(columns + 1, np.iinfo(np.int64).max, np.int64)
        for index in kept:
            cost = -(-extra[row][index] // step)
            if cost > columns:
                break
            moved = best[: columns + 1 - cost] + whole[row][index]
            better = moved < found[cost:]
            found[cost:][better] = moved[better]
            taken[row, cost:][better] = index
        best = found
    picked = [0] * len(choices)
    at = columns
    for row in reversed(range(len(choices))):
        picked[row] = int(taken[row, at])
        at -= -(-extra[row][picked[row]] // step)
    return _spend(choices, pruned, whole, picked, budget)


def most_common(choices: Sequence[Choice], picked: Sequence[int]) -> QuantSpec:
    """The spec that most weights have; the first in the order of specs among equals."""
    weights: dict[QuantSpec, int] = {}
    for choice, index in zip(choices, picked, strict=True):
        spec = choice.specs[index]
        if spec is not None:
            weights[spec] = weights.get(spec, 0) + choice.elements
    if not weights:
        raise ValueError("nothing is quantized at this size")
    return max(weights, key=lambda spec: (weights[spec], -spec.bits, spec.group_size, spec.mode))


def prior(*, head: bool, table: bool, layer: int | None, layers: int) -> float:
    """Loss in nats for each unit of relative squared error, where nothing was measured.

    An error of the head moves the logits themselves: half of their variance under the model, which
    is of the order of one. The layers share as much among themselves, the first and the last more
    (their errors pass through everything, or through nothing that could absorb them), as the stock
    mixed recipes and llama.cpp's also have it. A table that is only looked up counts as a first
    layer does.
    """
    if head:
        return 1.0
    each = 0.05 / max(1, layers)
    if table or layer == 0:
        return 4 * each
    return 2 * each if layer == layers - 1 else each


def _undominated(choice: Choice) -> list[int]:
    """Indices by bytes, each with less loss than every smaller one."""
    order = sorted(range(len(choice.specs)), key=lambda i: (choice.bytes[i], choice.losses[i], i))
    kept: list[int] = []
    for index in order:
        if not kept or choice.losses[index] < choice.losses[kept[-1]]:
            kept.append(index)
    return kept


def _whole_losses(choices: Sequence[Choice]) -> list[list[int]]:
    """Losses as whole numbers of one scale, small enough that no sum of them overflows."""
    top = max(loss for choice in choices for loss in choice.losses)
    scale = _LOSS_STEPS / top if top > 0 else 0.0
    return [[round(loss * scale) for loss in choice.losses] for choice in choices]


def _spend(
    choices: Sequence[Choice],
    pruned: Sequence[Sequence[int]],
    whole: Sequence[Sequence[int]],
    picked: list[int],
    budget: int,
) -> list[int]:
    """Spend what rounding left over on the steps that gain most for each byte."""
    left = budget - sum(choice.bytes[i] for choice, i in zip(choices, picked, strict=True))
    while True:
        steps = [
            (gain / more, -row, index)
            for row, (choice, kept) in enumerate(zip(choices, pruned, strict=True))
            for index in kept
            if 0 < (more := choice.bytes[index] - choice.bytes[picked[row]]) <= left
            and (gain := whole[row][picked[row]] - whole[row][index]) > 0
        ]
        if not steps:
            return picked
        _, negative, index = max(steps)
        row = -negative
        left -= choices[row].bytes[index] - choices[row].bytes[picked[row]]
        picked[row] = index
