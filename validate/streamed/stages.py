"""In which order a graph of MLX is computed, so that few of its weights are in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

_ITEM: Final = re.compile(r"^(.*)\.\d+$")


class Stages:
    """What the blocks of a model gave, call by call: all first blocks, all second blocks, ..."""

    def __init__(self) -> None:
        self._blocks: list[list[Any]] = []
        self._slices: dict[int, list[Any]] = {}
        self._at = 0
        self._depth = 0

    def begin(self) -> None:
        """A new call of the model begins."""
        self._at = 0

    def slice(self, number: int, value: Any) -> None:
        """A part of a projection onto the vocabulary; parts of one ``number`` share weights."""
        self._slices.setdefault(number, []).append(value)

    def evaluate(self) -> None:
        """Compute stage after stage; what a stage gave is then held by what follows alone."""
        mx: Any = import_module("mlx.core")
        stages = [*self._blocks, *(self._slices[number] for number in sorted(self._slices))]
        self._blocks, self._slices = [], {}
        stages.reverse()
        while stages:
            values = stages.pop()
            while values:
                mx.eval(values.pop(0))
            mx.clear_cache()

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Note what the blocks of ``model`` give; the outermost lists of modules hold them."""
        kinds = {}
        for _, block in blocks_of(model):
            kinds[id(block)] = (block, type(block))
        try:
            for block, kind in kinds.values():
                block.__class__ = self._noting(kind)
            yield
        finally:
            for block, kind in kinds.values():
                block.__class__ = kind

    def _noting(self, kind: type) -> type:
        def call(block: Any, *positional: Any, **named: Any) -> Any:
            self._depth += 1
            try:
                given = kind.__call__(block, *positional, **named)
            finally:
                self._depth -= 1
            if not self._depth:
                self._note(given)
            return given

        return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})

    def _note(self, given: Any) -> None:
        utils: Any = import_module("mlx.utils")
        mx: Any = import_module("mlx.core")
        values = [v for _, v in utils.tree_flatten(given) if isinstance(v, mx.array)]
        if self._at == len(self._blocks):
            self._blocks.append([])
        self._blocks[self._at].append(values)
        self._at += 1


def blocks_of(model: Any) -> list[tuple[str, Any]]:
    """The modules in the outermost lists of a model, by path."""
    items = [(path, m) for path, m in model.named_modules() if _ITEM.match(path)]
    outer: list[tuple[str, Any]] = []
    for path, module in sorted(items, key=lambda item: item[0].count(".")):
        if not any(path.startswith(f"{other}.") for other, _ in outer):
            outer.append((path, module))
    return outer
