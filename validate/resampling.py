"""Cubic resampling of tables of positions, as torch does it."""

from typing import Any, Final

import numpy as np

_BEND: Final = -0.75
"""The cubic's parameter, as torch has it."""


def cubic_taps(at: Any, count: Any, side: int) -> tuple[Any, Any]:
    """Four rows of a table of ``side`` and their weights, [4, places] each.

    Places ``at`` of ``count`` are spread over the table with its corners outside (as torch's
    ``align_corners=False``) and its edge repeated.
    """
    place = ((at.astype(np.float32) + np.float32(0.5)) / count.astype(np.float32)) * 2 - 1
    place = ((place + 1) * side - 1) / 2
    first = np.floor(place)
    past = place - first
    weights = np.stack([_far(past + 1), _near(past), _near(1 - past), _far(2 - past)])
    taps = np.stack([first + step for step in (-1, 0, 1, 2)]).clip(0, side - 1).astype(int)
    return taps, weights.astype(np.float32)


def _near(x: Any) -> Any:
    """The cubic up to one step away."""
    return (_BEND + 2) * x**3 - (_BEND + 3) * x**2 + 1


def _far(x: Any) -> Any:
    """The cubic between one and two steps away."""
    return _BEND * (x**3 - 5 * x**2 + 8 * x - 4)
