"""Comparing what a runtime's loader does with what a written map says, element by element."""

import math
from typing import Any

import numpy as np

from arch_maps.facts import Facts
from arch_maps.ops import Expr, evaluate, sources
from arch_maps.registry import ArchMap
from validate.lowering import Opaque
from validate.trace import Traced, trace_loader


class Numbered:
    """A RowReader in which every element of every source tensor has a number of its own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.values: dict[str, np.ndarray] = {}
        at = 1
        for name, shape in sorted(shapes.items()):
            size = math.prod(shape)
            self.values[name] = np.arange(at, at + size, dtype=np.float64).reshape(shape)
            at += size

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        value = self.values[name]
        return value[start:stop] if value.shape else value


def plain(target: str) -> str:
    """A target without the wrapper that mlx-vlm puts around a text-only model."""
    return target.removeprefix("language_model.")


def traced_by(source: Any, arch: ArchMap, runtime: str) -> Traced:
    """The loader of ``runtime`` on a release's headers, with the config that the map writes."""
    config = arch.config(dict(source.config), Facts(source.config))
    headers = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    return trace_loader(config, headers, runtime=runtime)


def differences(traced: Traced, rules: dict[str, Expr]) -> list[str]:
    """Targets that the loader fills otherwise than the rules do; targets of other parts aside."""
    written = {plain(target): expr for target, expr in rules.items()}
    made = {plain(path): parameter.value for path, parameter in traced.parameters.items()}
    found = [f"{name}: only the loader makes it" for name in sorted(made.keys() - written.keys())]
    for name in sorted(made.keys() & written.keys()):
        ours, theirs = written[name], made[name]
        if isinstance(theirs, Opaque):
            found.append(f"{name}: {theirs.why}")
            continue
        leaves = {leaf.name: tuple(leaf.shape) for one in (ours, theirs) for leaf in sources(one)}
        numbered = Numbered(leaves)
        if not np.array_equal(evaluate(ours, numbered), evaluate(theirs, numbered)):
            found.append(f"{name}: made of other elements")
    return found
