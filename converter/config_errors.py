"""A config that cannot be computed with is the release's fault, and is said as such."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from converter.errors import PlanError

MAP_FILES: Final = "map_files"
"""As the package is called that the modules of ``--map-file`` are put into."""
_OWN: Final = frozenset({"arch_maps", "quant", "converter", MAP_FILES})
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
    that no release has. The place that could not use the value is named instead: the innermost in
    this program or in the user's own map, not in a library that they call.
    """
    try:
        yield
    except _MISFITS as error:
        frames = list(traceback.walk_tb(error.__traceback__))[1:]  # the first is this one
        own = [(frame, line) for frame, line in frames if _package(frame) in _OWN]
        frame, line = (own or frames)[-1]
        raise PlanError(
            [
                f"config.json: a setting has a value that {reader} cannot use: "
                f"{type(error).__name__}: {error} ({_shown(frame)}, line {line})"
            ]
        ) from error


def _package(frame: FrameType) -> str:
    """The top of the dotted name of a frame's module, wherever that is installed."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _shown(frame: FrameType) -> str:
    """A frame's file, from its package on; of a user's map its name alone."""
    path, package = Path(frame.f_code.co_filename), _package(frame)
    if package == MAP_FILES or package not in path.parts:
        return path.name
    at = len(path.parts) - 1 - path.parts[::-1].index(package)
    return Path(*path.parts[at:]).as_posix()
