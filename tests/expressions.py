"""Random expression trees, arrays to read them from, and what numpy makes of them."""

import math
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from arch_maps.ops import (
    Affine,
    Concat,
    Constant,
    Expr,
    LowRank,
    Permute,
    Reshape,
    Slice,
    Source,
    Stack,
    sources,
)

relaxed = settings(deadline=None, max_examples=150)
"""For machines with other work to do."""


class Arrays:
    """A RowReader over arrays that remembers what was read."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values
        self.reads: list[tuple[str, int, int]] = []

    @classmethod
    def random(cls, *trees: Expr, dtype: Any = np.float32, seed: int = 0) -> "Arrays":
        """Different numbers in every element of every source."""
        leaves = {leaf.name: leaf.shape for tree in trees for leaf in sources(tree)}
        total = sum(math.prod(shape) for shape in leaves.values())
        numbers = iter(np.random.default_rng(seed).permutation(total))
        return cls(
            {
                name: np.array([next(numbers) for _ in range(math.prod(shape))], dtype).reshape(
                    shape
                )
                for name, shape in sorted(leaves.items())
            }
        )

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.reads.append((name, start, stop))
        value = self.values[name]
        assert 0 <= start <= stop <= (value.shape[0] if value.shape else 1)
        return value[start:stop] if value.shape else value


def reference(tree: Expr, values: dict[str, np.ndarray]) -> np.ndarray:
    """The tree's value by numpy's own functions, without rows."""
    match tree:
        case Source():
            return values[tree.name]
        case Permute():
            return np.transpose(reference(tree.x, values), tree.axes)
        case Reshape():
            return reference(tree.x, values).reshape(tree.shape)
        case Slice():
            whole = reference(tree.x, values)
            return whole.take(range(tree.start, tree.stop), axis=tree.axis)
        case Concat():
            return np.concatenate([reference(part, values) for part in tree.parts], tree.axis)
        case Stack():
            return np.stack([reference(part, values) for part in tree.parts], tree.axis)
        case Affine():
            value = reference(tree.x, values).astype(np.float32)
            return value * np.float32(tree.scale) + np.float32(tree.offset)
        case Constant():
            return np.full(tree.shape, tree.value, np.float32)
        case LowRank():
            x, up, down = (reference(part, values) for part in (tree.x, tree.up, tree.down))
            return x + tree.scale * (up @ down)


@st.composite
def trees(draw: st.DrawFn, depth: int = 4, arithmetic: bool = False) -> Expr:
    """Any tree of moves, with ``arithmetic`` also scaled, shifted and constant parts."""
    counter = iter(range(10_000))

    def leaf(shape: tuple[int, ...]) -> Expr:
        if arithmetic and draw(st.integers(0, 9)) == 0:
            return Constant(shape, draw(st.sampled_from([0.0, 0.5, -2.0])))
        return Source(f"t{next(counter)}", shape)

    def grow(shape: tuple[int, ...], left: int) -> Expr:
        """A tree with this shape, its root a random op that can make it."""
        if not shape or not left:
            return leaf(shape)
        kinds = ["permute", "reshape", "slice", "concat", "concat", "stack", "stack", "leaf"]
        kind = draw(st.sampled_from([*kinds, "affine"] if arithmetic else kinds))
        if kind == "permute":
            axes = tuple(draw(st.permutations(range(len(shape)))))
            inner = [0] * len(shape)
            for to, axis in enumerate(axes):
                inner[axis] = shape[to]
            return Permute(grow(tuple(inner), left - 1), axes)
        if kind == "reshape":
            return Reshape(grow(_another(draw, shape), left - 1), shape)
        if kind == "affine":
            scale = draw(st.sampled_from([1.0, 0.5, 2.0]))
            return Affine(grow(shape, left - 1), scale, draw(st.sampled_from([0.0, 1.0, -3.0])))
        axis = draw(st.integers(0, len(shape) - 1))
        size = shape[axis]
        if kind == "slice":
            before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
            inner_shape = (*shape[:axis], before + size + after, *shape[axis + 1 :])
            return Slice(grow(inner_shape, left - 1), axis, before, before + size)
        if kind == "concat" and size > 1:
            cut = draw(st.integers(1, size - 1))
            parts = [(*shape[:axis], n, *shape[axis + 1 :]) for n in (cut, size - cut)]
            return Concat(tuple(grow(part, left - 1) for part in parts), axis)
        if kind == "stack" and size <= 4:
            part = (*shape[:axis], *shape[axis + 1 :])
            return Stack(tuple(grow(part, left - 1) for _ in range(size)), axis)
        return leaf(shape)

    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return grow(shape, draw(st.integers(1, depth)))


def _another(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape of as many elements."""
    rest, sizes = math.prod(shape), []
    while len(sizes) < 2 and rest > 1:
        size = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        sizes.append(size)
        rest //= size
    return (*sizes, rest)
