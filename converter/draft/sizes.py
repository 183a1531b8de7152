"""Dimensions of parameters in the words of the config, found by varying the config.

Each integer of config.json is multiplied in turn, and the runtime's own model says which dimensions
move with it; so a hidden size of 1024 is not taken for 8 heads of 128.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from arch_maps.ops import Shape
from validate.probe import parameter_shapes
from validate.runtime import RuntimeRefusal

Field = tuple[str, str]
"""Section of config.json ("" for the top) and key."""
_NO_SIZE: Final = ("_id", "_ids", "_index", "_token", "seq_length", "seed")
_MANY: Final = 4
"""Fields in one dimension beyond which it stays a number."""
_BUILDS: Final = 27
"""Models that may be built to explain one dimension."""
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")


@dataclass(frozen=True, slots=True)
class Sum:
    """A dimension: integer multiples of products and quotients of fields, added up."""

    terms: tuple[tuple[Fraction, tuple[Field, ...], tuple[Field, ...]], ...]
    """Coefficient, fields above and fields below the line."""


@dataclass(slots=True)
class Sizes:
    """What every dimension of a runtime's parameters is made of."""

    config: Mapping[str, Any]
    runtime: str
    shapes: dict[str, Shape] = field(init=False)
    unvaried: list[Field] = field(default_factory=list)
    """Fields that the runtime's model cannot be built without, as they are."""
    _seen: dict[frozenset[tuple[Field, int]], dict[str, Shape] | None] = field(default_factory=dict)
    _moves: dict[Field, dict[str, Shape]] = field(default_factory=dict)
    _factors: dict[Field, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes = parameter_shapes(self.config, runtime=self.runtime)
        for one in fields_of(self.config):
            for factor in (2, 3):  # 3 where heads must keep dividing other heads
                moved = self._varied({one: factor})
                if moved is not None:
                    self._factors[one] = factor
                    if moved != self.shapes:
                        self._moves[one] = moved
                    break
            else:
                self.unvaried.append(one)

    def dimension(self, path: str, axis: int) -> Sum | None:
        """The dimension ``axis`` of parameter ``path``; None where it is a plain number."""
        size = self.shapes[path][axis]
        ratios = {}
        for one, shapes in self._moves.items():
            other = shapes.get(path)
            if other is not None and len(other) > axis and other[axis] != size:
                ratios[one] = Fraction(other[axis], size)
        if not ratios or len(ratios) > _MANY:
            return None
        powers = {one: Fraction(self._factors[one]) for one in ratios}
        squares = [one for one, ratio in ratios.items() if ratio == powers[one] ** 2]
        if all(
            ratio in (powers[one], 1 / powers[one], powers[one] ** 2)
            for one, ratio in ratios.items()
        ):
            above = (*(one for one, ratio in ratios.items() if ratio > 1), *squares)
            below = tuple(one for one, ratio in ratios.items() if ratio < 1)
            scale = Fraction(size * self._product(below), self._product(above))
            return Sum(((scale, above, below),)) if scale.denominator == 1 else None
        return self._added(path, axis, tuple(ratios))

    def value(self, one: Field) -> int:
        """The number that the config states for a field."""
        section, name = one
        return int((self.config[section] if section else self.config)[name])

    def _added(self, path: str, axis: int, names: tuple[Field, ...]) -> Sum | None:
        """Products and quotients of the fields ``names`` added up, told by varying them together.

        A field enters a term by one of a few powers, and multiplying it by g multiplies the term by
        that power of g: as many measurements as powers, along each field, give every term.
        """
        for powers in ((0, 1), (-1, 0, 1)):
            if len(powers) ** len(names) > _BUILDS:
                return None
            measured: dict[tuple[int, ...], Fraction] = {}
            for steps in itertools.product(range(len(powers)), repeat=len(names)):
                chosen = {n: self._factors[n] ** k for n, k in zip(names, steps, strict=True) if k}
                shapes = self._varied(chosen)
                if shapes is None or path not in shapes:
                    return None
                measured[steps] = Fraction(shapes[path][axis])
            found = self._solved(measured, names, powers)
            if found is not None:
                return found
        return None

    def _solved(
        self,
        measured: Mapping[tuple[int, ...], Fraction],
        names: tuple[Field, ...],
        powers: tuple[int, ...],
    ) -> Sum | None:
        amounts = dict(measured)
        for at, one in enumerate(names):
            inverse = _inverse(
                [
                    [Fraction(self._factors[one]) ** (p * k) for p in powers]
                    for k in range(len(powers))
                ]
            )
            amounts = {
                steps: sum(
                    (
                        inverse[steps[at]][k] * amounts[(*steps[:at], k, *steps[at + 1 :])]
                        for k in range(len(powers))
                    ),
                    Fraction(0),
                )
                for steps in amounts
            }
        terms = []
        for steps, amount in amounts.items():
            if not amount:
                continue
            raised = dict(zip(names, (powers[k] for k in steps), strict=True))
            above = tuple(one for one, power in raised.items() if power == 1)
            below = tuple(one for one, power in raised.items() if power == -1)
            scale = amount * self._product(below) / self._product(above)
            if scale.denominator != 1 or scale < 0:
                return None
            terms.append((scale, above, below))
        return Sum(tuple(terms)) if len(terms) <= _MANY else None

    def _product(self, names: tuple[Field, ...]) -> int:
        return math.prod(map(self.value, names))

    def _varied(self, factors: Mapping[Field, int]) -> dict[str, Shape] | None:
        """Shapes with some fields multiplied; None where the model cannot be built so."""
        key = frozenset(factors.items())
        if not key:
            return self.shapes
        if key not in self._seen:
            config = copy.deepcopy(dict(self.config))
            for (section, name), factor in factors.items():
                (config[section] if section else config)[name] *= factor
            try:
                self._seen[key] = parameter_shapes(config, runtime=self.runtime)
            except RuntimeRefusal:
                self._seen[key] = None
        return self._seen[key]


def fields_of(config: Mapping[str, Any]) -> list[Field]:
    """Integers of config.json and its sections that may be sizes of tensors."""
    sections = [("", config)]
    sections += [(name, value) for name, value in config.items() if isinstance(value, Mapping)]
    return [
        (section, name)
        for section, data in sections
        for name, value in data.items()
        if type(value) is int
        and value > 1
        and name not in _LAYERS
        and not name.endswith(_NO_SIZE)
        and not section.startswith(("rope", "quantization"))
    ]


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """The inverse of a small matrix, exactly."""
    size = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for at in range(size):
        pivot = next(i for i in range(at, size) if rows[i][at])
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = [value / rows[at][at] for value in rows[at]]
        for other in range(size):
            if other != at:
                factor = rows[other][at]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[at], strict=True)]
    return [row[size:] for row in rows]
