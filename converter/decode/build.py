"""Collecting a decoded view: tensors taken one after another, every problem kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from arch_maps.ops import Shape
from arch_maps.rules import Drop
from converter.decode.model import Coded
from converter.decode.patterns import Budget, Expression
from converter.source import Stored, TensorInfo
from converter.source.header import quote

Shapes = Callable[[], Mapping[str, tuple[Shape, ...]]]
"""The shapes that a release's map allows for each tensor, worked out when first needed."""


@dataclass(slots=True)
class Builder:
    """What is left of a release's tensors, what was made of the others, and what was wrong."""

    tensors: dict[str, TensorInfo]
    dtype: str
    """The dtype that the release declares for its weights, as a safetensors code."""
    shapes: Shapes
    tables: Callable[[], Set[str]] = frozenset
    """The tensors that are look-up tables by the release's map, worked out when first needed."""
    gguf: Mapping[str, Stored] = field(default_factory=dict)
    """What a GGUF file says of each tensor."""
    gguf_drops: Mapping[str, str] = field(default_factory=dict)
    coded: dict[str, Coded] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    """Of all expressions that the config brings."""

    def problem(self, text: str) -> None:
        """Note what is wrong, and go on to find the rest."""
        self.problems.append(text)

    def add(self, coded: Coded, *, dtype: str | None = None) -> None:
        """Put the plain tensor in the place of what it is read from."""
        first = self.tensors[coded.reads[0]]
        for name in coded.reads:
            self.tensors.pop(name, None)
        if coded.name in self.tensors:
            self.problem(f"{coded.name}: is there both quantized ({coded.reads[0]}) and plain")
            return
        info = first._replace(name=coded.name, dtype=dtype or self.dtype, shape=coded.shape)
        self.tensors[coded.name] = info
        self.coded[coded.name] = coded

    def drop(self, name: str, reason: str) -> None:
        """Leave a tensor of the scheme out, if it is there."""
        if self.tensors.pop(name, None) is not None:
            self.drops.append(Drop(name, reason))

    def drop_ending(self, endings: Mapping[str, str]) -> None:
        """Leave out every tensor whose name ends so, with that ending's reason."""
        for name in list(self.tensors):
            for ending, reason in endings.items():
                if name.endswith(ending):
                    self.drop(name, reason)
                    break

    def expect(
        self, name: str, dtypes: Iterable[str], *shapes: Shape, needed_by: str
    ) -> TensorInfo | None:
        """The tensor ``name``, if it has one of these dtypes and shapes; else a problem."""
        info = self.tensors.get(name)
        if info is None:
            self.problem(f"missing: {name}, without which {needed_by} cannot be decoded")
            return None
        allowed = tuple(dtypes)
        if info.dtype not in allowed:
            self.problem(f"{name}: is {info.dtype}, where {' or '.join(allowed)} is expected")
            return None
        if shapes and info.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            self.problem(
                f"{name}: is {list(info.shape)}, but {needed_by} and config.json make it {wanted}"
            )
            return None
        return info

    def with_ending(self, ending: str) -> list[str]:
        """Names of the tensors left that end so, without the ending."""
        return [name.removesuffix(ending) for name in self.tensors if name.endswith(ending)]

    def stays_plain(self, module: str, ignored: Callable[[str], bool]) -> bool:
        """Whether config.json leaves a module unquantized; that it is not is a problem.

        Lists of what is left plain name linear layers: of a look-up table that they cover, the
        headers tell.
        """
        if not ignored(module) or f"{module}.weight" in self.tables():
            return False
        self.problem(
            f"{module}: config.json says that it is not quantized, but its tensors are there"
        )
        return True


def integer(settings: Mapping[str, Any], key: str, default: int | None = None) -> int | None:
    """A whole number of the settings, None where it is absent or none."""
    value = settings.get(key, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def positive(value: Any) -> bool:
    """Whether ``value`` is a whole number above zero and of a sensible size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24


def name_matcher(entries: Any, build: Builder, *, where: str) -> Callable[[str], bool]:
    """Whether a module is in a list of names, of ends of names, and of ``re:`` expressions.

    A name without an expression covers the module so called, what lies below it, and any module
    whose path ends with it in whole words.
    """
    if entries is None:
        entries = []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        build.problem(f"config.json: {where} must be a list of names")
        return lambda module: False
    plain = {entry for entry in entries if not entry.startswith("re:") and "*" not in entry}
    patterns = []
    for entry in entries:
        if entry.startswith("re:"):
            patterns.append(compiled(entry.removeprefix("re:"), build, where=where))
        elif "*" in entry:
            text = ".*".join(re.escape(part) for part in re.split(r"\*+", entry))
            patterns.append(compiled(f"{text}$", build, where=where))
    found = [pattern for pattern in patterns if pattern is not None]
    sizes = sorted({len(entry) for entry in plain})  # which add up to no more than the entries do

    def matches(module: str) -> bool:
        for size in sizes:
            rest = len(module) - size
            if rest < 0:
                break
            if module[:size] in plain and module[size : size + 1] in ("", "."):
                return True
            if module[rest:] in plain and module[:rest][-1:] in ("", "."):
                return True
        return any(pattern.match(module) for pattern in found)

    return matches


def compiled(text: str, build: Builder, *, where: str) -> Expression | None:
    """A regular expression of the config; None, and a problem, where it cannot be trusted."""
    try:
        return Expression(text, build.budget)
    except re.error as error:
        build.problem(f"config.json: {where}: {quote(text)} is no regular expression: {error}")
    except ValueError as problem:
        build.problem(f"config.json: {where}: {quote(text)} {problem}; it is not run")
    return None


def groups_for(group: int, columns: int) -> int | None:
    """MLX's widest group that groups of ``group`` columns split into, None where there is none.

    ``group`` may be the whole row.
    """
    for size in (128, 64, 32):
        if columns % size == 0 and (group % size == 0):
            return size
    return None
