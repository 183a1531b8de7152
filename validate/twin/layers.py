"""Which layers of a deep stack a twin keeps: every kind, in order, over two periods."""

from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Final

RUN_CAP: Final = 2
UNIFORM_LAYERS: Final = 3
PERIODS: Final = 2


def select_layers(kinds: Sequence[Hashable]) -> tuple[int, ...]:
    """Indices of the layers to keep, ascending, given the kind of each source layer.

    A uniform stack keeps three layers.  Otherwise runs of one kind are cut to two layers, over
    the first two periods of a periodic pattern or over the whole stack of an irregular one.
    """
    if len(set(kinds)) <= 1:
        return tuple(range(min(len(kinds), UNIFORM_LAYERS)))
    span = len(kinds)
    period = _period(kinds)
    if period is not None:
        span = min(span, PERIODS * period)
    kept: list[int] = []
    for _, run in groupby(range(span), key=lambda index: kinds[index]):
        kept.extend(list(run)[:RUN_CAP])
    return tuple(kept)


def _period(kinds: Sequence[Hashable]) -> int | None:
    """The smallest period that repeats at least twice, or None; a cut-off last one counts."""
    for period in range(2, len(kinds) // 2 + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            return period
    return None
