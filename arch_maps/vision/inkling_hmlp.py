"""Inkling's tower: patches that are folded step by step, each step a projection, no attention."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, Final

from arch_maps.facts import Facts
from arch_maps.rules import Kind, Mount

EPSILON: Final = 1e-6
"""The norms' epsilon, which the reference has in code."""
_ROUNDED: Final = 64
"""Channels between two steps are a multiple of this."""
_WIDEST: Final = 1024
"""Pixels of a patch's side, far more than any release has; it bounds the steps to choose from."""

Step = tuple[int, int, int]
"""Frames, pixels of a side, and channels that a place holds after a step."""


def _factors(number: int) -> list[int]:
    """Prime factors, the largest first."""
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found[::-1]


def steps(frames: int, side: int, layers: int, channels: int) -> list[Step]:
    """The states between ``layers`` folds of a patch of ``frames`` x ``side`` x ``side`` pixels.

    Of all prime steps, pixels first, those whose logarithms come closest to evenly spaced ones;
    first and last are fixed. As the reference's ``plan_out_scales``, whose assignment keeps the
    order, since both rows rise.
    """
    sides = list(accumulate(_factors(side), mul))
    times = list(accumulate(_factors(frames), mul))
    wide = [math.ceil(n * n * channels / _ROUNDED) * _ROUNDED for n in sides]
    known: list[Step] = [(1, 1, channels)]
    known += [(1, n, size) for n, size in zip(sides, wide, strict=True)]
    whole = sides[-1] if sides else 1
    known += [(t, whole, math.ceil(whole**2 * channels * t / _ROUNDED) * _ROUNDED) for t in times]
    span = math.log(frames * side * side * channels)
    ideal = [span * index / layers for index in range(layers + 1)]
    have = [math.log(t * n * n) for t, n, _ in known]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(known) + 1)
    for want in ideal:  # best[k]: the cheapest choice so far out of the first k
        row: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())]
        for place, size in enumerate(have):
            cost, chosen = best[place]
            row.append(min(row[-1], (cost + abs(want - size), (*chosen, place))))
        best = row
    chosen = best[-1][1]
    return [known[place] for place in (0, *chosen[1:-1], len(known) - 1)]


def _planned(facts: Facts) -> list[Step]:
    """The steps of a config; its problems are collected."""
    side, frames = int(facts.size("patch_size", 40)), int(facts.size("temporal_patch_size", 2))
    channels, layers = int(facts.size("num_channels", 3)), facts.count("n_layers")
    folds = len(_factors(side)) + len(_factors(frames)) if max(side, frames) <= _WIDEST else 0
    if not 0 < layers < folds:
        facts.problem(
            f"config.json: {facts.path}n_layers ({layers}) must be fewer than the prime factors of "
            f"a patch of {frames} x {side} pixels ({folds})"
        )
        return [(1, 1, channels)]
    return steps(frames, side, layers, channels)


def tower(at: Mount, given: Facts, hidden: int) -> None:
    """Projections with norms between them, to the text's width, below ``at``."""
    planned = _planned(_released(given))
    last = len(planned) - 2
    for index, (old, new) in enumerate(pairwise(planned)):
        frames, side = new[0] // old[0], new[1] // old[1]
        inp, out = old[2] * frames * side * side, hidden if index == last else new[2]
        weight = at.input(f"layers.linear_{index}.weight", out, inp)
        at.rule(f"encoder_layers.{index}.projection.weight", weight, Kind.LINEAR)
        if index < last:
            norm = at.input(f"layers.norm_{index}.weight", out)
            at.rule(f"encoder_layers.{index}.layer_norm.weight", norm, Kind.NORM)
    at.norm("final_norm", hidden)


def _released(facts: Facts) -> Facts:
    """The tower's facts under one name each."""
    layers = facts.data.get("n_layers", facts.data.get("num_hidden_layers"))
    return facts.overruled({"n_layers": layers})


def spell_config(config: dict[str, Any], given: Facts, hidden: int) -> None:
    """Write the tower's facts as the runtime reads them, in place."""
    facts = _released(given)
    why = "the runtime computes it so for this type"
    facts.expect("vision_encoder_type", "hmlp", default="hmlp", why=why)
    facts.expect("use_vision_norm", True, default=True, why=why)
    channels = int(facts.size("num_channels", 3))
    facts.expect("n_channels", channels, default=channels, why="the reference reads num_channels")
    config.update(
        model_type="inkling_vision",
        patch_size=int(facts.size("patch_size", 40)),
        temporal_patch_size=int(facts.size("temporal_patch_size", 2)),
        num_channels=channels,
        n_layers=facts.count("n_layers"),
        text_hidden_size=hidden,
        rms_norm_eps=EPSILON,
    )
