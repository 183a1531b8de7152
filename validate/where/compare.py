"""Traces of both sides, held against each other and against the reference's own noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from validate.metrics import relative_error
from validate.where.bearing import Bearing, Rows
from validate.where.pairs import Pair
from validate.where.trace import Side, Trace, Values

FACTOR: Final = 32.0
"""How many times the floor a right computation may be away from the reference.

Two float32 computations that add up in different orders are within a few of each other's noise;
a wrong weight or a wrong constant is thousands away.
"""
_LEAST: Final = 2.0**-22
"""A floor below which float32 does not go: two units in the last place of the largest value."""


@dataclass(frozen=True, slots=True)
class Step:
    """One compared event, in the order of the reference."""

    torch: str
    mlx: str
    side: Side
    error: float
    """max |difference| / max |reference| over the rows of the prompt."""
    decode: float | None
    """The same over rows of single-token steps; None without such."""
    floor: float
    """The reference's own distance, the largest up to here."""
    content: bytes
    """Digest of the reference's values: what two modules share is one value."""
    fresh: bool
    """Whether no input before it had the same values: it is no sibling's input again."""
    leaf: bool
    """Whether no compared module is inside it."""
    scaled: bool = False
    """Whether the values differ by one factor alone."""

    def good(self, *, decode: bool) -> bool:
        """Whether the distance is one that right computations have."""
        error = self.decode if decode else self.error
        return error is None or error <= FACTOR * self.floor


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first module that computes something else."""

    torch: str
    mlx: str
    error: float
    floor: float
    decode: bool
    """Whether only single-token steps show it."""
    within: tuple[str, str] | None = None
    """Between which of its children it happens, where it is the module's own computation."""

    def text(self) -> str:
        """One sentence for a report."""
        place = f"{self.mlx or 'the model itself'}"
        if self.within is not None:
            place += f", between {self.within[0]} and {self.within[1]}"
        when = " in single-token steps" if self.decode else ""
        return (
            f"first parts at {place}{when}: off by {self.error:.1e} where the reference's own "
            f"noise is {self.floor:.1e}"
        )


@dataclass(frozen=True, slots=True)
class Where:
    """All compared events, and the first that diverges, if any."""

    steps: tuple[Step, ...]
    first: Divergence | None
    outputs: float = 0.0
    """How far the models' own outputs are apart: max |difference| / max |reference|."""

    def to_json(self) -> dict[str, Any]:
        """The growth of the error along the depth as plain data."""
        return {
            "modules": [
                [step.mlx, step.side, step.error, step.decode, step.floor] for step in self.steps
            ],
            "first": None if self.first is None else self.first.text(),
        }


def compare_traces(
    pairs: Sequence[Pair],
    reference: Trace,
    again: Trace,
    runtime: Trace,
    *,
    prompt: int,
    steps: int,
    outputs: float,
    bearing: Bearing | None = None,
) -> Where:
    """Compare what ``runtime`` computed with ``reference``; ``again`` is the reference's noise.

    The reference ran ``prompt + steps`` tokens at once, the runtime the prompt and then single
    tokens, which are compared apart. ``outputs`` is how far the models' own outputs are apart:
    where that is no more than noise, nothing diverges, wherever the sides draw their lines.
    Rows that have no ``bearing`` on the outputs are left out.
    Events that the two sides do not shape alike are passed over: experts see tokens in another
    order.
    """
    partner = {pair.torch: pair.mlx for pair in pairs}
    scaled = {pair.torch for pair in pairs if pair.scaled}
    outer = {path.rsplit(".", n)[0] for path in partner for n in range(1, path.count(".") + 1)}
    folded = bool(scaled)
    events: list[Step] = []
    seen: set[bytes] = set()
    floor = _LEAST
    # What runs once for tokens and again for what a picture became ends after its tower.
    for path, side in reference if steps else reference.ended():
        mlx = partner.get(path)
        if mlx is None or (side == "out" and path in scaled):
            continue
        wanted, found = reference.values(path, side), runtime.values(mlx, side)
        own = again.values(path, side)
        if wanted is None or found is None or own is None:
            continue
        if not wanted[0].shape == found[0].shape == own[0].shape:
            continue  # of the calls; the same shape keeps the same rows
        axis = found[1] if steps else None
        if axis is not None and wanted[0].shape[axis] != prompt + steps:
            continue
        right, other, same = wanted[0].values, found[0].values, own[0].values
        matter = (bearing or {}).get((path, side))
        if matter is not None and not matter.all():
            if not matter.any():
                continue
            right, other, same = (_rows(values, matter) for values in (right, other, same))
        errors = _errors(right, other, axis, prompt, folded=folded)
        floor = max(floor, relative_error(right, same))
        content = hashlib.blake2b(wanted[0].values.tobytes(), digest_size=16).digest()
        fresh, leaf = content not in seen, path not in outer
        seen.update([content] if side == "in" else [])
        step = Step(path, mlx, side, *errors, floor, content, fresh, leaf)
        if side == "out" and leaf and not step.good(decode=False):
            taken_out = _errors(right, other, axis, prompt, folded=True)
            step = replace(step, scaled=max(e or 0.0 for e in taken_out) <= FACTOR * floor)
        events.append(step)
    if outputs <= FACTOR * floor or not events:
        return Where(tuple(events), None, outputs)
    first = _first(events, partner) or _unseen(events, outputs, floor)
    return Where(tuple(events), first, outputs)


def _rows(values: Values, matter: Rows) -> Values:
    return values.reshape(-1, values.shape[-1])[matter]


def _errors(
    wanted: Values, found: Values, axis: int | None, prompt: int, *, folded: bool
) -> tuple[float, float | None]:
    """Errors of the prompt and of the single tokens, which lie behind it along ``axis``.

    ``folded``: weights hold multipliers of the release, so that values between them may differ by
    a factor; it is taken out.
    """
    if folded:
        square = float(np.vdot(found, found))
        factor = float(np.vdot(wanted, found)) / square if square > 0 else 1.0
        found = found * np.float32(factor if np.isfinite(factor) else 1.0)
    if axis is None:
        return relative_error(wanted, found), None
    (first, later), (mine, after) = (
        np.split(wanted, [prompt], axis),
        np.split(found, [prompt], axis),
    )
    return relative_error(first, mine), relative_error(later, after)


def _first(steps: Sequence[Step], partner: Mapping[str, str]) -> Divergence | None:
    for decode in (False, True):
        drowned: int | None = None
        for index, step in enumerate(steps):
            if step.good(decode=decode):
                continue
            healed = _heals(steps, index, decode=decode)
            if healed == "elsewhere":
                continue
            own = step.side == "out" and _had_good_inputs(steps, index, decode=decode)
            if healed == "by a norm":
                drowned = index if own and drowned is None else drowned
                continue
            if drowned is not None:
                return _blame_output(steps, drowned, decode=decode)
            if own:
                return _blame_output(steps, index, decode=decode)
            return _blame_between(steps, index, partner, decode=decode)
    return None


def _unseen(steps: Sequence[Step], outputs: float, floor: float) -> Divergence:
    """Wrong outputs of modules that all agree, as far as they could be compared."""
    good = [step for step in steps if step.good(decode=False)]
    within = (_last(good[-1].mlx) if good else "its start", "its end")
    return Divergence("", "", outputs, floor, False, within)


def _heals(steps: Sequence[Step], index: int, *, decode: bool) -> str:
    """How what is made of a wrong value is right again; "" where it is not.

    "elsewhere": the two sides only draw the line between modules in other places. A multiplier is
    inside the embedding here and behind it there; heads lie in another order between a projection
    and the next. "by a norm": the value is larger by a factor, which norms take out again. That may
    be meant, as where a whole residual stream has a scale of its own, or be the trace of a fault
    that shows when the value is added to another.
    """
    step = steps[index]
    rest = steps[index:]
    if step.side == "out" and _is_right_elsewhere(steps, index, decode=decode):
        return "elsewhere"
    taken = [s for s in rest if s.side == "in" and s.content == step.content and s.leaf]
    takers = {s.torch for s in taken}
    made = [s for s in rest if s.side == "out" and s.torch in takers]
    if made:
        if not all(s.good(decode=decode) for s in made):
            return ""
        right = step.side == "out" and all(s.good(decode=decode) for s in taken)
        return "elsewhere" if right or step.side == "in" else "by a norm"
    if taken or step.side == "in":
        return ""
    if _was_fed(steps, index):  # right where a scale or an order is made good further out
        around = next((s for s in rest if s.side == "out" and _inside(step.torch, s.torch)), None)
        return "elsewhere" if around is not None and around.good(decode=decode) else ""
    if step.leaf and step.scaled:
        return "elsewhere"  # a table whose multiplier is inside here and behind it there
    later = next((s for s in steps[index + 1 :] if s.side == "in" and s.fresh), None)
    return "elsewhere" if later is not None and later.good(decode=decode) else ""


def _is_right_elsewhere(steps: Sequence[Step], index: int, *, decode: bool) -> bool:
    """Whether another module gives or takes the same value, and rightly.

    The runtime's module then only returns something else beside what it hands on.
    """
    return any(
        other.content == steps[index].content and other.good(decode=decode)
        for place, other in enumerate(steps)
        if place != index
    )


def _was_fed(steps: Sequence[Step], index: int) -> bool:
    """Whether a module without children was seen to take floats: its output is its weights' alone.

    Tables that tokens are looked up in take none, and may be scaled inside or behind.
    """
    step = steps[index]
    return step.leaf and any(s.torch == step.torch and s.side == "in" for s in steps[:index])


def _had_good_inputs(steps: Sequence[Step], index: int, *, decode: bool) -> bool:
    """Whether the module was seen to be given what the reference gives it."""
    step = steps[index]
    for other in steps[:index]:
        if other.torch == step.torch and other.side == "in":
            return other.good(decode=decode)
    return True


def _blame_output(steps: Sequence[Step], index: int, *, decode: bool) -> Divergence:
    """A module with good inputs and bad outputs: its own computation, after its last child."""
    step = steps[index]
    children = [s for s in steps[:index] if _inside(s.torch, step.torch)]
    last = children[-1] if children else None
    within = (_last(last.mlx), "its end") if last is not None else None
    return Divergence(step.torch, step.mlx, _error(step, decode), step.floor, decode, within)


def _blame_between(
    steps: Sequence[Step],
    index: int,
    partner: Mapping[str, str],
    *,
    decode: bool,
) -> Divergence:
    """Bad inputs: the innermost module around both this one and the last good event."""
    step = steps[index]
    before = steps[index - 1] if index else None
    path = step.torch.rpartition(".")[0]
    while path and (
        path not in partner or (before is not None and not _around(path, before.torch))
    ):
        path = path.rpartition(".")[0]
    start = _last(before.mlx) if before is not None else "its start"
    within = (start, _last(step.mlx))
    return Divergence(path, partner.get(path, ""), _error(step, decode), step.floor, decode, within)


def _error(step: Step, decode: bool) -> float:
    error = step.decode if decode else step.error
    assert error is not None
    return error


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")


def _around(outer: str, path: str) -> bool:
    return path == outer or _inside(path, outer)


def _last(path: str) -> str:
    """A module's own name, with its number where it is one of a list."""
    words = path.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]
