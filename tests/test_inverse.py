"""Solving maps backwards: whatever the targets determine comes back bit for bit."""

import itertools
import math

import numpy as np
from expressions import Arrays, relaxed, trees
from hypothesis import given
from hypothesis import strategies as st

from arch_maps.inverse import invert
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
    children,
    evaluate,
    exact,
    sources,
)


def forth_and_back(targets: dict[str, Expr], values: Arrays) -> dict[str, np.ndarray]:
    """Evaluate the targets, forget the sources, and solve for them again."""
    made = Arrays({name: evaluate(expr, values) for name, expr in targets.items()})
    solved = invert((Source(name, expr.shape), expr) for name, expr in targets.items())
    return {name: evaluate(expr, made) for name, expr in solved.items()}


def check(targets: dict[str, Expr], *, missing: set[str] = frozenset()) -> None:
    values = Arrays.random(*targets.values())
    back = forth_and_back(targets, values)
    assert set(values.values) - set(back) == missing
    for name, value in back.items():
        assert value.shape == values.values[name].shape
        assert value.tobytes() == values.values[name].tobytes(), name


def has_slice(tree: Expr) -> bool:
    return isinstance(tree, Slice) or any(map(has_slice, children(tree)))


@relaxed
@given(trees().filter(lambda tree: not has_slice(tree)))
def test_every_tree_of_moves_inverts(tree):
    check({"out": tree})


@relaxed
@given(trees().filter(lambda tree: exact(tree)), st.data())
def test_every_tiling_of_a_tree_inverts(tree, data):
    """A value that is cut into slices, each its own target, in any order."""
    assert tree.shape
    axis = data.draw(st.integers(0, len(tree.shape) - 1))
    size = tree.shape[axis]
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1)))) if size > 1 else []
    edges = [0, *cuts, size]
    spans = list(itertools.pairwise(edges))
    spans = data.draw(st.permutations(spans))
    targets = {f"o{low}": Slice(tree, axis, low, high) for low, high in spans}
    expected = invert([(Source("whole", tree.shape), tree)])
    values = Arrays.random(tree)
    back = forth_and_back(targets, values)
    assert set(back) == set(expected)
    for name, value in back.items():
        assert value.tobytes() == values.values[name].tobytes()


@relaxed
@given(trees())
def test_nothing_is_ever_solved_wrong(tree):
    """Trees with slices that cover a part: what is solved is right, the rest is absent."""
    values = Arrays.random(tree)
    back = forth_and_back({"out": tree}, values)
    for name, value in back.items():
        assert value.tobytes() == values.values[name].tobytes()
    if not has_slice(tree):
        assert set(back) == {leaf.name for leaf in sources(tree)}


def test_fused_qkv_split_per_head():
    heads, dim, hidden = 4, 2, 6
    fused = Source("qkv", (heads * 3 * dim, hidden))
    grouped = Reshape(fused, (heads, 3, dim, hidden))
    check(
        {
            name: Reshape(Slice(grouped, 1, i, i + 1), (heads * dim, hidden))
            for i, name in enumerate(("q", "k", "v"))
        }
    )


def test_uneven_qkv_split_by_rows():
    fused = Source("qkv", (12, 5))
    check({"q": Slice(fused, 0, 0, 8), "k": Slice(fused, 0, 8, 10), "v": Slice(fused, 0, 10, 12)})


def test_interleaved_gate_and_up():
    fused = Source("gate_up", (10, 4))
    pairs = Reshape(fused, (5, 2, 4))
    check({n: Reshape(Slice(pairs, 1, i, i + 1), (5, 4)) for i, n in enumerate(("gate", "up"))})


def test_stacked_and_fused_experts():
    gate = tuple(Source(f"{i}.gate", (3, 4)) for i in range(5))
    up = tuple(Source(f"{i}.up", (3, 4)) for i in range(5))
    check({"experts": Stack(tuple(Concat(pair) for pair in zip(gate, up, strict=True)))})


def test_experts_stored_transposed():
    fused = Source("experts", (4, 6, 10))
    moved = Permute(fused, (0, 2, 1))
    check({"gate": Slice(moved, 1, 0, 5), "up": Slice(moved, 1, 5, 10)})


def test_convolution():
    check({"w": Permute(Source("conv", (8, 3, 2, 4, 4)), (0, 2, 3, 4, 1))})


def test_norm_offset_is_undone_in_float32():
    weight = Source("norm", (64,))
    values = Arrays({"norm": np.random.default_rng(0).normal(size=64).astype(np.float32)})
    back = forth_and_back({"out": Affine(weight, offset=1.0)}, values)
    np.testing.assert_allclose(back["norm"], values.values["norm"], atol=2.0**-23)
    powers = Arrays({"norm": np.arange(64, dtype=np.float32) / 64})
    back = forth_and_back({"out": Affine(weight, scale=4.0, offset=1.0)}, powers)
    np.testing.assert_array_equal(back["norm"], powers.values["norm"])


def test_a_folded_adapter_does_not_come_apart():
    parts = {"w": (4, 6), "up": (4, 2), "down": (2, 6)}
    fold = LowRank(*(Source(name, shape) for name, shape in parts.items()), 2.0)
    assert invert([(Source("out", fold.shape), fold)]) == {}


def test_a_gap_leaves_the_source_unknown():
    fused = Source("qkv", (12, 5))
    check({"q": Slice(fused, 0, 0, 8), "v": Slice(fused, 0, 10, 12)}, missing={"qkv"})
    check({"q": Slice(fused, 0, 4, 12)}, missing={"qkv"})
    check({"q": Slice(fused, 0, 0, 8)}, missing={"qkv"})


def test_slices_of_different_axes_do_not_tile():
    x = Source("x", (4, 4))
    check({"a": Slice(x, 0, 0, 2), "b": Slice(x, 1, 2, 4)}, missing={"x"})


def test_overlapping_slices_do_not_tile():
    x = Source("x", (6,))
    check({"a": Slice(x, 0, 0, 4), "b": Slice(x, 0, 2, 6)}, missing={"x"})


def test_an_alias_takes_the_first_target():
    x = Source("x", (2, 2))
    solved = invert([(Source("head", (2, 2)), x), (Source("table", (2, 2)), x)])
    assert solved == {"x": Source("head", (2, 2))}


def test_constants_determine_nothing():
    assert invert([(Source("ones", (3,)), Constant((3,), 1.0))]) == {}


@relaxed
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_inverse_of_an_inverse_is_the_map(heads, dim, parts):
    """Solving the solution again gives back an expression of the same value."""
    fused = Source("x", (heads * parts * dim, 3))
    grouped = Reshape(fused, (heads, parts, dim, 3))
    targets = {
        f"t{i}": Reshape(Slice(grouped, 1, i, i + 1), (heads * dim, 3)) for i in range(parts)
    }
    (solution,) = invert((Source(n, e.shape), e) for n, e in targets.items()).values()
    again = invert([(fused, solution)])
    values = Arrays({"x": np.arange(math.prod(fused.shape)).reshape(fused.shape)})
    for name, expr in targets.items():
        np.testing.assert_array_equal(evaluate(again[name], values), evaluate(expr, values))
