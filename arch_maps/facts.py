"""Reading config.json: every fact a map relies on is asked for by name, and nothing is guessed.

``Facts`` collects all problems instead of stopping at the first, so that a plan can report them
at once. Sizes carry their names, so that a wrong shape can be explained in the config's terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

Choice = TypeVar("Choice", str, int, float, bool)
_REQUIRED: Final = object()
MAX_SIZE: Final = 2**31 - 1
MAX_LAYERS: Final = 4096


class Dim(int):
    """A size with the name it has in the config; products and sums keep the names."""

    label: str

    def __new__(cls, value: int, label: str) -> Dim:
        """Make a size of ``value`` called ``label``."""
        self = super().__new__(cls, value)
        self.label = label
        return self

    def __mul__(self, other: int) -> Dim:
        """Product, with both names."""
        return Dim(int(self) * int(other), f"{_atom(self)}*{_atom(other)}")

    def __rmul__(self, other: int) -> Dim:
        """Product, with both names."""
        return Dim(int(self) * int(other), f"{_atom(other)}*{_atom(self)}")

    def __add__(self, other: int) -> Dim:
        """Sum, with both names."""
        return Dim(int(self) + int(other), f"{_label(self)}+{_label(other)}")

    __radd__ = __add__

    def __floordiv__(self, other: int) -> Dim:
        """Quotient, with both names."""
        return Dim(int(self) // int(other), f"{_atom(self)}/{_atom(other)}")


def _label(value: int) -> str:
    return value.label if isinstance(value, Dim) else str(value)


def _atom(value: int) -> str:
    text = _label(value)
    return f"({text})" if "+" in text else text


def spell_shape(shape: Sequence[int]) -> str:
    """A shape with the config's names, such as ``[hidden_size=64, 3]``."""
    named = (f"{s.label}={int(s)}" if isinstance(s, Dim) else str(s) for s in shape)
    return f"[{', '.join(named)}]"


class Facts:
    """A view of a (sub-)config with typed look-ups; problems are collected in ``problems``."""

    def __init__(
        self, data: Mapping[str, Any], *, path: str = "", parent: Facts | None = None
    ) -> None:
        """View ``data``, which lives at ``path`` of config.json."""
        self.data = data
        self.path = path
        self.problems: list[str] = [] if parent is None else parent.problems
        self.notes: list[str] = [] if parent is None else parent.notes

    def section(self, name: str) -> Facts:
        """The sub-config ``name``; its absence is a problem."""
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            self.problem(f"config.json lacks the section {self._at(name)}")
            value = {}
        return Facts(value, path=f"{self._at(name)}.", parent=self)

    def nested(self, name: str) -> Facts:
        """The sub-config ``name``, or this one where the release is written flat."""
        return self.section(name) if name in self.data else self

    def filled(self, defaults: Mapping[str, Any]) -> Facts:
        """The same view, where keys that are not stated have the reference's ``defaults``."""
        stated = {key: value for key, value in self.data.items() if value is not None}
        return Facts({**defaults, **stated}, path=self.path, parent=self)

    def overruled(self, fixed: Mapping[str, Any]) -> Facts:
        """The same view, where the reference has ``fixed`` whatever is stated."""
        return Facts({**self.data, **fixed}, path=self.path, parent=self)

    def size(self, name: str, default: int | None = None) -> Dim:
        """A positive integer."""
        value = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            self.problem(f"config.json does not state {self._at(name)}")
            return Dim(1, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
            self.problem(f"config.json: {self._at(name)} must be a positive integer, not {value!r}")
            return Dim(1, name)
        return Dim(value, name)

    def count(self, name: str, default: int | None = None) -> int:
        """A number of layers, bounded so that a hostile config cannot exhaust memory."""
        value = self.size(name, default)
        if value > MAX_LAYERS:
            self.problem(
                f"config.json: {self._at(name)} = {int(value)} exceeds the limit of {MAX_LAYERS}"
            )
            return 1
        return int(value)

    def pair(self, name: str, default: tuple[int, int]) -> tuple[int, int]:
        """Two positive integers, or one that stands for both."""
        value = self.data.get(name)
        if value is None:
            return default
        if type(value) is int:
            value = (value, value)
        ok = isinstance(value, list | tuple) and len(value) == 2
        if not ok or not all(type(v) is int and 0 < v <= MAX_SIZE for v in value):
            self.problem(f"config.json: {self._at(name)} must be two positive integers")
            return default
        return (value[0], value[1])

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(f"config.json: {self._at(name)} must be true or false, not {value!r}")
            return default
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            self.problem(f"config.json does not state {self._at(name)}")
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problem(f"config.json: {self._at(name)} must be a number, not {value!r}")
            return 0.0
        if not math.isfinite(value):
            self.problem(f"config.json: {self._at(name)} must be a finite number, not {value!r}")
            return 0.0
        return value

    def expect(self, name: str, *allowed: Choice | None, default: Choice | None, why: str) -> None:
        """Require one of ``allowed``; ``why`` says what the runtime cannot do otherwise."""
        value = self.data.get(name, default)
        if value not in allowed:
            listed = " or ".join(repr(choice) for choice in allowed)
            self.problem(f"config.json: {self._at(name)} is {value!r}, not {listed}: {why}")

    def problem(self, text: str) -> None:
        """Record one problem."""
        if text not in self.problems:
            self.problems.append(text)

    def note(self, text: str) -> None:
        """Record something that the plan, the report and the card must say."""
        if text not in self.notes:
            self.notes.append(text)

    def _at(self, name: str) -> str:
        return f"{self.path}{name}"
