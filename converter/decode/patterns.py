"""Regular expressions that a config brings, run only where they cannot take forever.

Python's matcher backtracks. An expression that repeats something which itself repeats or branches
takes time that doubles with every character; several unbounded repetitions in a row take a power of
the length. Both are told from the parsed expression, not from its text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

MAX_LENGTH: Final = 500
MAX_REPEATS: Final = 4
"""Unbounded repetitions one after another: names of modules are short."""
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


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
