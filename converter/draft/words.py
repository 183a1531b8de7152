"""Source text of a drafted map: sizes by their names in the config, expressions, calls."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from arch_maps.ops import (
    Affine,
    Concat,
    Constant,
    Expr,
    HeadHadamard,
    LowRank,
    Permute,
    Reshape,
    Slice,
    Source,
    Stack,
)
from converter.draft.sizes import Field, Sizes, Sum

WIDTH: Final = 100
_SECTIONS: Final = {"": "facts", "text_config": "text", "llm_config": "text"}
Labels = Sequence[str | None]
"""The text of each dimension; None where it is not known yet."""


@dataclass(slots=True)
class Words:
    """Names sizes within one function, and remembers what the function must look up."""

    sizes: Sizes
    used: dict[str, Field] = field(default_factory=dict)
    """Variable -> field of the config."""
    unsure: dict[int, set[str]] = field(default_factory=dict)
    """Numbers that several sizes would explain."""
    _known: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    _tiles: dict[tuple[Expr, int], dict[int, tuple[int, str]]] = field(default_factory=dict)

    def variable(self, one: Field) -> str:
        """The variable that holds a field."""
        section, name = one
        short = name.lower()
        if section not in _SECTIONS:
            short = f"{section.removesuffix('_config')}_{short}"
        self.used[short] = one
        return short

    def labels(self, path: str) -> list[str | None]:
        """The dimensions of a parameter of the runtime."""
        shape = self.sizes.shapes.get(path)
        if shape is None:
            return []
        found = [self._label(path, axis) for axis in range(len(shape))]
        for size, label in zip(shape, found, strict=True):
            if label is not None:
                self._known[size].add(label)
        return found

    def learn(self, rules: Iterable[tuple[Expr, Labels]]) -> None:
        """Take note of tensors that are cut up, so that the cuts are named by what they leave."""
        for expr, labels in rules:
            self._learn(expr, labels)

    def dims(self, shape: Sequence[int], labels: Labels) -> list[str]:
        """Each dimension as text, a number where nothing else is certain."""
        known = [*labels, *([None] * (len(shape) - len(labels)))]
        return [label or self._guess(int(n)) for n, label in zip(shape, known, strict=True)]

    def expression(self, expr: Expr, labels: Labels, mount: str) -> str:
        """Python text that builds ``expr`` with inputs below the mount ``mount``."""
        match expr:
            case Source():
                return call(f"{mount}.input", [quoted(expr.name), *self.dims(expr.shape, labels)])
            case Permute():
                inner = self.expression(expr.x, _permuted(expr, labels), mount)
                return call("Permute", [inner, tuple_text(map(str, expr.axes))])
            case Affine():
                inner = self.expression(expr.x, labels, mount)
                scale = [] if expr.scale == 1.0 else [f"scale={expr.scale!r}"]
                offset = [] if expr.offset == 0.0 else [f"offset={expr.offset!r}"]
                return call("Affine", [inner, *scale, *offset])
            case HeadHadamard():
                inner = self.expression(expr.x, labels, mount)
                return call("HeadHadamard", [inner, str(expr.axis), str(int(expr.head))])
            case LowRank():
                wide = labels[1] if len(labels) > 1 else None
                down = self.expression(expr.down, [None, wide], mount)
                up = self.expression(expr.up, labels[:1], mount)
                inner = self.expression(expr.x, labels, mount)
                return call("LowRank", [inner, up, down, repr(expr.scale)])
            case Reshape():
                inner = self.expression(expr.x, _reshaped(expr, labels), mount)
                return call("Reshape", [inner, tuple_text(self.dims(expr.shape, labels))])
            case Slice():
                return self._slice(expr, labels, mount)
            case Constant():
                shape = tuple_text(self.dims(expr.shape, labels))
                return call("Constant", [shape, repr(expr.value)])
            case Stack():
                return self._stack(expr, labels, mount)
            case Concat():
                rest = _without(labels, expr.axis, None)
                parts = [self.expression(part, rest, mount) for part in expr.parts]
                axis = [] if expr.axis == 0 else [str(expr.axis)]
                return call("Concat", [tuple_text(parts), *axis])

    def _label(self, path: str, axis: int) -> str | None:
        found = self.sizes.dimension(path, axis)
        return None if found is None else self._sum(found)

    def _sum(self, found: Sum) -> str:
        terms = []
        for scale, above, below in found.terms:
            factors = [] if scale == 1 and above else [str(scale)]
            text = " * ".join([*factors, *map(self.variable, above)])
            text += "".join(f" // {self.variable(one)}" for one in below)
            terms.append(text)
        return " + ".join(terms)

    def _learn(self, expr: Expr, labels: Labels) -> None:
        match expr:
            case Slice():
                label = labels[expr.axis] if len(labels) > expr.axis else None
                cuts = self._tiles.setdefault((expr.x, expr.axis), {})
                size = expr.stop - expr.start
                cuts[expr.start] = (expr.stop, label or self._guess(size))
                self._learn(expr.x, _without(labels, expr.axis, None))
            case Permute():
                self._learn(expr.x, _permuted(expr, labels))
            case Reshape():
                self._learn(expr.x, _reshaped(expr, labels))
            case Affine():
                self._learn(expr.x, labels)
            case Stack():
                self._learn(expr.parts[0], _dropped(labels, expr.axis))

    def _cuts(self, x: Expr, axis: int) -> list[str] | None:
        """The sizes that the cuts of ``x`` leave, in order, where they leave nothing out."""
        at, texts = 0, []
        cuts = self._tiles.get((x, axis), {})
        while at in cuts:
            at, text = cuts[at][0], cuts[at][1]
            texts.append(text)
        return texts if at == x.shape[axis] else None

    def _slice(self, expr: Slice, labels: Labels, mount: str) -> str:
        cuts = self._cuts(expr.x, expr.axis)
        whole = None if cuts is None else added(cuts)
        inner = self.expression(expr.x, _without(labels, expr.axis, whole), mount)
        start, stop = str(expr.start), str(expr.stop)
        if cuts is not None:
            starts = sorted(self._tiles[expr.x, expr.axis])
            number = starts.index(expr.start)
            edges = ["0", *accumulate(cuts, lambda a, b: added([a, b]))]
            start, stop = edges[number], added(cuts[: number + 1])
            start = "0" if number == 0 else added(cuts[:number])
        return call("Slice", [inner, str(expr.axis), start, stop])

    def _stack(self, expr: Stack, labels: Labels, mount: str) -> str:
        inner = _dropped(labels, expr.axis)
        axis = [] if expr.axis == 0 else [str(expr.axis)]
        pattern = _counted(expr.parts)
        if pattern is None:
            parts = [self.expression(part, inner, mount) for part in expr.parts]
            return call("Stack", [tuple_text(parts), *axis])
        count = (labels[expr.axis] if len(labels) > expr.axis else None) or str(len(expr.parts))
        one = self.expression(pattern, inner, mount).replace('"' + _MARK, 'f"', 1)
        return call("Stack", [f"tuple({one} for i in range({count}))", *axis])

    def _guess(self, size: int) -> str:
        exact = self._known.get(size, set())
        if len(exact) == 1:
            return next(iter(exact))
        if exact:
            self.unsure.setdefault(size, set()).update(exact)
        return str(size)


_MARK: Final = "\0"
_COMPREHENSION: Final = re.compile(r"(.*\)) (for i in range\([^()]*\))")


def _counted(parts: Sequence[Expr]) -> Source | None:
    """The one leaf that all parts are, but for a number that counts up; its name an f-string."""
    if len(parts) < 2 or not all(isinstance(part, Source) for part in parts):
        return None
    names = [part.name for part in parts if isinstance(part, Source)]
    for found in re.finditer(r"(?<![^.])0(?=\.|$)", names[0]):
        before, after = names[0][: found.start()], names[0][found.end() :]
        if names == [f"{before}{index}{after}" for index in range(len(names))]:
            first = parts[0]
            assert isinstance(first, Source)
            return Source(f"{_MARK}{before}{{i}}{after}", first.shape)
    return None


def call(name: str, arguments: Sequence[str]) -> str:
    """A call on one line; ``wrapped`` breaks it where it is too long."""
    return f"{name}({', '.join(arguments)})"


def quoted(text: str) -> str:
    """A string literal in double quotes."""
    return f'"{text}"'


def tuple_text(items: Iterable[str]) -> str:
    """A tuple display."""
    listed = list(items)
    return f"({listed[0]},)" if len(listed) == 1 else f"({', '.join(listed)})"


def added(texts: Sequence[str]) -> str:
    """A sum of sizes, equal ones counted."""
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    terms = []
    for text, count in counts.items():
        simple = " + " not in text
        terms.append(text if count == 1 else f"{count} * {text if simple else f'({text})'}")
    if all(term.isdigit() for term in terms):
        return str(sum(map(int, terms)))
    return " + ".join(terms)


def wrapped(line: str, indent: int) -> list[str]:
    """The line, its outermost brackets opened until it fits."""
    pad = " " * indent
    if len(pad) + len(line) <= WIDTH:
        return [pad + line]
    if not line.endswith(")"):
        first, *rest = re.split(r" (?=if |else |\+ )", line)
        return [pad + first, *(pad + term for term in rest)]
    opened = line.index("(")
    pieces = _split(line[opened + 1 : -1])
    if len(pieces) == 1 and (found := _COMPREHENSION.fullmatch(pieces[0])):
        inside = [*wrapped(found[1], indent + 4), f"{pad}    {found[2]}"]
        return [pad + line[: opened + 1], *inside, pad + ")"]
    inner = [wrapped(piece, indent + 4) for piece in pieces]
    body = [text for lines in inner for text in [*lines[:-1], lines[-1] + ","]]
    return [pad + line[: opened + 1], *body, pad + ")"]


def _split(text: str) -> list[str]:
    """Arguments at the top level of a call."""
    pieces, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            pieces.append(text[start:at].strip())
            start = at + 1
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]


def _permuted(expr: Permute, labels: Labels) -> Labels:
    inner: list[str | None] = [None] * len(expr.axes)
    for to, axis in enumerate(expr.axes):
        inner[axis] = labels[to] if to < len(labels) else None
    return inner


def _reshaped(expr: Reshape, labels: Labels) -> Labels:
    """Labels of dimensions at either end that the reshape leaves alone."""
    old, new = tuple(expr.x.shape), tuple(expr.shape)
    found: list[str | None] = [None] * len(old)
    if len(labels) != len(new):
        return found
    for at in range(min(len(old), len(new))):
        if old[at] != new[at]:
            break
        found[at] = labels[at]
    for at in range(1, min(len(old), len(new)) + 1):
        if old[-at] != new[-at]:
            break
        found[-at] = labels[-at]
    return found


def _without(labels: Labels, axis: int, replacement: str | None) -> Labels:
    return [replacement if at == axis else label for at, label in enumerate(labels)]


def _dropped(labels: Labels, axis: int) -> Labels:
    return [label for at, label in enumerate(labels) if at != axis]


def lookups(used: Mapping[str, Field]) -> list[str]:
    """The lines that read every variable a function uses."""
    lines = []
    for name, (section, key) in sorted(used.items(), key=lambda item: (item[1][0], item[0])):
        view = _SECTIONS.get(section) or section.removesuffix("_config")
        lines.append(f"{name} = {view}.size({quoted(key)})")
    return lines


def views(sections: Iterable[str]) -> list[str]:
    """The lines that open the sections of the config."""
    return [
        f"{_SECTIONS.get(section) or section.removesuffix('_config')} = "
        f"facts.section({quoted(section)})"
        for section in sorted(set(sections))
        if section
    ]
