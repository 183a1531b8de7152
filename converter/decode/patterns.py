"""Regular expressions that a config brings, run only where they cannot take forever.

Python's matcher backtracks. An expression that repeats something which itself repeats or branches
takes time that doubles with every character: it is not run. Several repetitions in a row take a
power of the length; optional pieces and alternatives in a row multiply it. Releases have four
(``re:.*layers\\.\\d+\\..*(up_proj|down_proj)$``), so a few are allowed, and all their time is
bounded together. Both are told from the parsed expression.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from converter.errors import PlanError
from converter.source.header import quote

MAX_LENGTH: Final = 500
MAX_REPEATS: Final = 4
"""Pieces that are repeated as often as they fit."""
MAX_CHOICES: Final = (4096, 4096, 4096, 64, 8)
"""Ways that optional pieces and alternatives may make together, by the number of repetitions."""
MAX_NAME: Final = 256
"""Characters of a name: four repetitions then take some seconds at the very worst."""
MAX_SECONDS: Final = 20.0
"""What slow matches may take of a budget; sound ones take microseconds each."""
_SLOW: Final = 1e-3
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


@dataclass(slots=True)
class Budget:
    """Processor seconds that slow matches have taken, of all expressions of one use together."""

    spent: float = 0.0


class Expression:
    """An expression that is run within bounds."""

    def __init__(self, text: str, budget: Budget) -> None:
        """Raises ValueError saying why it is not run, re.error where it is none."""
        self._pattern = _compiled(text)
        self._budget = budget

    def match(self, name: str, start: int = 0) -> bool:
        """Whether it matches at ``start`` of ``name``; PlanError where that takes too long."""
        if len(name) > MAX_NAME:
            raise PlanError([f"{quote(name)}: is too long a name to match with an expression"])
        started = time.thread_time()
        found = self._pattern.match(name, start) is not None
        took = time.thread_time() - started
        if took > _SLOW:
            self._budget.spent += took
        if self._budget.spent > MAX_SECONDS:
            raise PlanError([f"{quote(self._pattern.pattern)}: takes too long to match names with"])
        return found


@lru_cache(256)
def _compiled(text: str) -> re.Pattern[str]:
    if problem := pattern_problem(text):
        raise ValueError(problem)
    return re.compile(text)


def pattern_problem(text: str) -> str | None:
    """Why an expression is not run, None for one that is sound; raises re.error for none."""
    if len(text) > MAX_LENGTH:
        return f"has more than {MAX_LENGTH} characters"
    parser: Any = getattr(re, "_parser")  # noqa: B009
    try:
        tree = parser.parse(text)
    except (RecursionError, OverflowError):
        return "is nested too deeply"
    repeats, choices = 0, 1
    for name, body, least, most in _nodes(tree):
        if name == "GROUPREF":
            return "refers back to what it matched"
        if most > 1 and any(n == "BRANCH" or low != high for n, _, low, high in _nodes(body)):
            return "repeats repetitions or alternatives"
        repeats += most > 1 and least != most
        choices *= 2 if least != most and most == 1 else 1
    for count in _alternatives(tree):
        choices *= count
    choices //= _choice(tree)  # of whole expressions each is tried once
    if repeats > MAX_REPEATS or choices > MAX_CHOICES[repeats]:
        return (
            f"has more than {MAX_REPEATS} repetitions, or too many optional pieces and alternatives"
        )
    return None


def _alternatives(tree: Any) -> Iterator[int]:
    """How many ways each place has at which an expression offers several."""
    for operator, argument in tree:
        if str(operator) == "BRANCH":
            yield len(argument[1])
        below = [argument[2]] if str(operator) in _REPEATS else _trees(argument)
        for part in below:
            yield from _alternatives(part)


def _choice(tree: Any) -> int:
    """Between how many others an expression is a choice as a whole; 1 for none."""
    nodes = [(str(operator), argument) for operator, argument in tree if str(operator) != "AT"]
    if len(nodes) != 1:
        return 1
    [(name, argument)] = nodes
    if name == "BRANCH":
        return len(argument[1])
    return _choice(argument[-1]) if name == "SUBPATTERN" else 1


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
