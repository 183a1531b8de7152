"""A config that cannot be computed with is the release's fault, and is said as such."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from converter.errors import PlanError

_OWN: Final = Path(__file__).parents[1]
# What Python raises for a value of another kind, size or structure than an expression takes.
_MISFITS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextmanager
def config_errors(reader: str) -> Iterator[None]:
    """PlanError where ``reader``, which computes with nothing but config.json, cannot go on.

    Whatever is commonly misspelt has an error of its own, which names the key; this is for values
    that no release has. The place that could not use the value is named instead.
    """
    try:
        yield
    except _MISFITS as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).is_relative_to(_OWN)]
        place = Path((own or frames)[-1].filename)
        shown = place.relative_to(_OWN) if place.is_relative_to(_OWN) else place.name
        raise PlanError(
            [
                f"config.json: a setting has a value that {reader} cannot use: "
                f"{type(error).__name__}: {error} ({shown}, line {(own or frames)[-1].lineno})"
            ]
        ) from error
