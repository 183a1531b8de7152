"""Every op against numpy, whole and by rows."""

import math

import numpy as np
import pytest
from expressions import Arrays, reference, relaxed, trees
from hypothesis import given
from hypothesis import strategies as st

from arch_maps import ops
from arch_maps.ops import (
    Affine,
    Concat,
    Constant,
    LowRank,
    Permute,
    Reshape,
    Slice,
    Source,
    Stack,
    describe,
    evaluate,
    exact,
    passes_through,
    row_count,
    sources,
    streamable,
)

A, B = Source("a", (4, 6)), Source("b", (2, 6))
A3 = Source("c", (2, 3, 4))


def arrays(*leaves):
    return Arrays({leaf.name: filled(leaf) for leaf in leaves})


def filled(leaf):
    return np.arange(math.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape)


@relaxed
@given(trees(), st.data())
def test_rows_are_slices_of_the_whole(tree, data):
    reader = Arrays.random(tree)
    whole = evaluate(tree, reader)
    assert whole.shape == tree.shape
    count = row_count(tree.shape)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    part = evaluate(tree, reader, start, stop)
    expected = whole[start:stop] if tree.shape else whole
    assert part.shape == expected.shape
    assert part.tobytes() == expected.tobytes()


@relaxed
@given(trees(arithmetic=True))
def test_value_matches_numpy_written_out(tree):
    reader = Arrays.random(tree)
    np.testing.assert_array_equal(evaluate(tree, reader), reference(tree, reader.values))


@relaxed
@given(trees())
def test_moves_keep_the_dtype_and_are_exact(tree):
    reader = Arrays.random(tree, dtype=np.int16)
    assert exact(tree)
    assert evaluate(tree, reader).dtype == np.int16


@relaxed
@given(trees())
def test_only_a_permute_that_moves_rows_is_not_streamable(tree):
    assert streamable(tree) != any(
        isinstance(node, Permute) and node.axes[0] != 0 for node in nodes(tree)
    )


def nodes(tree):
    yield tree
    for child in ops.children(tree):
        yield from nodes(child)


def test_conv_permute_reads_only_the_rows_asked_for():
    leaf = Source("w", (8, 3, 2, 2))
    reader = arrays(leaf)
    tree = Permute(leaf, (0, 2, 3, 1))
    evaluate(tree, reader, 2, 5)
    assert reader.reads == [("w", 2, 5)]
    assert tree.shape == (8, 2, 2, 3)


def test_slice_along_rows_reads_only_its_range():
    reader = arrays(A)
    evaluate(Slice(A, 0, 1, 4), reader, 1, 2)
    assert reader.reads == [("a", 2, 3)]


def test_concat_reads_only_the_parts_in_range():
    reader = arrays(A, B)
    tree = Concat((A, B))
    assert tree.shape == (6, 6)
    evaluate(tree, reader, 4, 6)
    assert reader.reads == [("b", 0, 2)]


def test_stack_of_experts_reads_only_the_experts_in_range():
    experts = tuple(Source(f"e{i}", (2, 3)) for i in range(4))
    reader = arrays(*experts)
    tree = Stack(experts)
    value = evaluate(tree, reader, 1, 3)
    assert tree.shape == (4, 2, 3)
    assert [name for name, *_ in reader.reads] == ["e1", "e2"]
    np.testing.assert_array_equal(value, np.stack([filled(e) for e in experts])[1:3])


def test_interleaved_qkv_is_taken_apart_per_head():
    heads, dim, hidden = 4, 2, 5
    fused = Source("qkv", (heads * 3 * dim, hidden))
    reader = arrays(fused)
    grouped = Reshape(fused, (heads, 3, dim, hidden))
    for index in range(3):
        one = Reshape(Slice(grouped, 1, index, index + 1), (heads * dim, hidden))
        rows = [h * 3 * dim + index * dim + d for h in range(heads) for d in range(dim)]
        np.testing.assert_array_equal(evaluate(one, reader), filled(fused)[rows])
        np.testing.assert_array_equal(evaluate(one, reader, 3, 6), filled(fused)[rows[3:6]])
        assert streamable(one)


@pytest.mark.parametrize("shape", [(24,), (2, 12), (3, 8), (24, 1), (1, 2, 3, 4)])
def test_reshape_by_rows_at_every_boundary(shape):
    reader = arrays(A3)
    tree = Reshape(A3, shape)
    whole = filled(A3).reshape(shape)
    for start in range(shape[0]):
        for stop in range(start + 1, shape[0] + 1):
            np.testing.assert_array_equal(evaluate(tree, reader, start, stop), whole[start:stop])


def test_reshape_to_a_scalar_and_back():
    leaf = Source("s", ())
    reader = Arrays({"s": np.float32(7).reshape(())})
    assert evaluate(leaf, reader).shape == ()
    assert evaluate(Reshape(leaf, (1,)), reader).tolist() == [7.0]
    assert evaluate(Reshape(Reshape(leaf, (1,)), ()), reader).shape == ()


def test_reshape_of_no_elements():
    leaf = Source("z", (0, 4))
    assert evaluate(Reshape(leaf, (2, 0)), Arrays({"z": np.zeros((0, 4))})).shape == (2, 0)


def test_affine_computes_in_float32():
    import ml_dtypes

    leaf = Source("w", (3,))
    values = np.array([0.001, 1.0, -0.5], ml_dtypes.bfloat16)
    result = evaluate(Affine(leaf, offset=1.0), Arrays({"w": values}))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, values.astype(np.float32) + np.float32(1))
    doubled = evaluate(Affine(leaf, scale=2.0), Arrays({"w": values}))
    np.testing.assert_array_equal(doubled, values.astype(np.float32) * 2)


def adapted(dtype, rank=5, scale=1.5):
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 8), "up": (6, rank), "down": (rank, 8)}
    values = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return LowRank(*(Source(name, shapes[name]) for name in shapes), scale), Arrays(values)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_an_adapter_is_folded_as_mlx_folds_it(name):
    import ml_dtypes
    import mlx.core as mx

    tree, reader = adapted(getattr(ml_dtypes, name, np.float16))
    result = evaluate(tree, reader)
    w, up, down = (
        mx.array(value.astype(np.float32)).astype(getattr(mx, name))
        for value in reader.values.values()
    )
    folded = np.array((w + 1.5 * (up @ down)).astype(mx.float32))
    assert result.dtype == reader.values["w"].dtype
    np.testing.assert_array_equal(result.astype(np.float32), folded)


def test_an_adapter_folds_by_rows():
    tree, reader = adapted(np.float64)
    whole = evaluate(tree, reader)
    np.testing.assert_allclose(whole, reference(tree, reader.values), atol=1e-6)
    np.testing.assert_array_equal(evaluate(tree, reader, 2, 5), whole[2:5])
    assert reader.reads[-3:] == [("w", 2, 5), ("up", 2, 5), ("down", 0, 5)]
    assert not streamable(tree)
    assert not exact(tree)
    assert not passes_through(tree)
    assert [leaf.name for leaf in sources(tree)] == ["w", "up", "down"]


def test_constant_reads_nothing():
    reader = Arrays({})
    assert evaluate(Constant((3, 2), 0.5), reader, 1, 3).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert evaluate(Constant((), 2.0), reader).shape == ()
    assert reader.reads == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reshape(A, (5, 5)),
        lambda: Slice(A, 0, 2, 2),
        lambda: Slice(A, 1, 0, 7),
        lambda: Slice(A, 1, -1, 3),
        lambda: LowRank(A, Source("up", (4, 3)), Source("down", (2, 6))),
        lambda: LowRank(A, Source("up", (5, 3)), Source("down", (3, 6))),
    ],
    ids=[
        *("reshape", "empty slice", "slice past the end", "negative slice"),
        *("two ranks", "an adapter of other rows"),
    ],
)
def test_impossible_nodes_cannot_be_made(make):
    with pytest.raises(AssertionError):
        make()


def test_exact_and_passes_through():
    assert exact(Concat((A, B)))
    assert not exact(Concat((A, Affine(B, offset=1.0))))
    assert not exact(Constant((2,), 1.0))
    assert passes_through(A)
    assert passes_through(Reshape(Reshape(A, (24,)), (2, 12)))
    assert not passes_through(Slice(A, 0, 0, 4))
    assert not passes_through(Reshape(Permute(A, (1, 0)), (4, 6)))
    assert not passes_through(Affine(A, offset=1.0))


def test_streamable_looks_at_the_whole_tree():
    assert streamable(Permute(A3, (0, 2, 1)))
    assert not streamable(Permute(A3, (1, 0, 2)))
    assert not streamable(Concat((B, Slice(Permute(Source("t", (6, 4)), (1, 0)), 0, 0, 2))))


def test_sources_come_left_to_right_with_repeats():
    tree = Concat((Slice(B, 0, 0, 1), A, B))
    assert [leaf.name for leaf in sources(tree)] == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (A, "a"),
        (Permute(A3, (0, 2, 1)), "permute(c, 0,2,1)"),
        (Reshape(A, (2, 12)), "reshape(a, 2x12)"),
        (Slice(A, 1, 2, 4), "slice(a, axis=1, 2:4)"),
        (Concat((A, B)), "concat([a, b], axis=0)"),
        (Stack((B, B), 1), "stack([b, b], axis=1)"),
        (Affine(A, 1.0, 1.0), "affine(a, *1 +1)"),
        (Constant((2, 3), 0.5), "constant(2x3, 0.5)"),
        (LowRank(A, A, Source("d", (6, 6)), 2.0), "lowrank(a, a, d, *2)"),
    ],
)
def test_describe(tree, text):
    assert describe(tree) == text


@relaxed
@given(trees(arithmetic=True))
def test_describe_names_every_source(tree):
    text = describe(tree)
    assert all(leaf.name in text for leaf in sources(tree))
