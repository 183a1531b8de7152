"""Regular expressions that a config brings, run only where they cannot take forever.

Python's matcher backtracks. An expression that repeats something which itself repeats or branches
takes time that doubles with every character: it is not run. Several repetitions in a row take a
power of the length. Releases have up to three (``re:.*layers\\.\\d+\\..*_proj$``), so a few are
allowed, and their time is bounded as a whole. Both are told from the parsed expression.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from converter.errors import PlanError
from converter.source.header import quote

MAX_LENGTH: Final = 500
MAX_REPEATS: Final = 4
MAX_NAME: Final = 256
"""Characters of a name: four repetitions then take some seconds at the very worst."""
MAX_SECONDS: Final = 20.0
"""What slow matches of an expression may take together; sound ones take microseconds each."""
_SLOW: Final = 1e-3
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


class Expression:
    """An expression that is run within bounds."""

    def __init__(self, text: str) -> None:
        """Raises ValueError saying why it is not run, re.error where it is none."""
        if problem := pattern_problem(text):
            raise ValueError(problem)
        self._pattern = re.compile(text)
        self._spent = 0.0

    def match(self, name: str) -> bool:
        """Whether ``name`` begins with it; PlanError where finding out takes too long."""
        if len(name) > MAX_NAME:
            raise PlanError([f"{quote(name)}: is too long a name to match with an expression"])
        started = time.perf_counter()
        found = self._pattern.match(name) is not None
        took = time.perf_counter() - started
        if took > _SLOW:
            self._spent += took
        if self._spent > MAX_SECONDS:
            raise PlanError([f"{quote(self._pattern.pattern)}: takes too long to match names with"])
        return found


@lru_cache(256)
def expression(text: str) -> Expression:
    """The expression ``text``; raises as ``Expression`` does."""
    return Expression(text)


def pattern_problem(text: str) -> str | None:
    """Why an expression is not run, None for one that is sound; raises re.error for none."""
    if len(text) > MAX_LENGTH:
        return f"has more than {MAX_LENGTH} characters"
    parser: Any = getattr(re, "_parser")  # noqa: B009
    try:
        tree = parser.parse(text)
    except (RecursionError, OverflowError):
        return "is nested too deeply"
    repeats = 0
    for name, body, least, most in _nodes(tree):
        if name == "GROUPREF":
            return "refers back to what it matched"
        if most > 1 and any(n == "BRANCH" or low != high for n, _, low, high in _nodes(body)):
            return "repeats repetitions or alternatives"
        repeats += most > 1 and least != most
    if repeats > MAX_REPEATS:
        return f"has more than {MAX_REPEATS} repetitions"
    return None


def _nodes(tree: Any) -> Iterator[tuple[str, Any, int, int]]:
    """Each node's name, what it repeats, and how often at least and at most."""
    for operator, argument in tree:
        name = str(operator)
        if name in _REPEATS:
            least, most, body = argument
            yield name, body, int(least), int(most)
            yield from _nodes(body)
        else:
            yield name, (), 1, 1
            for below in _trees(argument):
                yield from _nodes(below)


def _trees(argument: Any) -> Iterator[Any]:
    """The expressions inside a node's argument: of groups, branches and looks ahead."""
    if hasattr(argument, "data") and hasattr(argument, "state"):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from _trees(item)
