"""Searched scales and biases: against a slow reference, and never worse than round to nearest."""

import ml_dtypes
import numpy as np
import pytest

from quant import search
from quant.errors import NonFiniteError
from quant.moments import diagonal_blocks, narrowed
from quant.packing import unpack_rows
from quant.recipe import QuantSpec
from quant.weights import dequantize_rows, quantize_rows

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
AFFINE = [(2, 64), (3, 32), (4, 64), (4, 128), (8, 64)]
MICROSCALED = ("mxfp4", "mxfp8", "nvfp4")


def weights_of(rows=6, columns=256, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * rng.lognormal(0, 1, (rows, 1)) * 0.02
    w[0] = 0.0
    w[1] = 0.3
    w[2] = np.abs(w[2])
    w[3, 5] *= 40
    return np.ascontiguousarray(w.astype(np.float32).astype(dtype))


def values(parts, spec):
    """What the stored parts stand for, in exact arithmetic (float64)."""
    if spec.mode != "affine":
        return dequantize_rows(parts, spec, "F32").astype(np.float64)
    codes = unpack_rows(parts["weight"], spec.bits).astype(np.float64)
    scale, bias = (
        np.repeat(parts[role].astype(np.float64), spec.group_size, 1)
        for role in ("scales", "biases")
    )
    return scale * codes + bias


def group_errors(w, parts, spec, importance):
    error = importance * np.square(w.astype(np.float64) - values(parts, spec))
    return error.reshape(len(w), -1, spec.group_size).sum(-1)


def specs(method):
    found = [QuantSpec.make("affine", bits, group, method) for bits, group in AFFINE]
    return found + [QuantSpec.make(mode, method=method) for mode in MICROSCALED]


def moments_of(group, columns=256, seed=1):
    """Second moments of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    basis = rng.standard_normal((columns // 4, columns))
    x = rng.standard_normal((1000, columns // 4)) @ basis + rng.standard_normal((1000, columns))
    x *= rng.lognormal(0, 0.7, columns)
    return diagonal_blocks(x.T @ x / len(x), group)


def output_errors(w, parts, spec, moments):
    error = (w.astype(np.float64) - values(parts, spec)).reshape(len(w), -1, spec.group_size)
    return np.einsum("rgi,gij,rgj->rg", error, moments.astype(np.float64), error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_group_is_worse_than_round_to_nearest(dtype):
    w = weights_of(dtype=dtype)
    for spec in specs("search"):
        rtn = quantize_rows(w, QuantSpec.make(spec.mode, spec.bits, spec.group_size))
        found = quantize_rows(w, spec)
        a, b = (group_errors(w, parts, spec, np.ones(256)) for parts in (found, rtn))
        assert (a <= b * (1 + 1e-5) + 1e-18).all(), spec
        if spec.mode != "mxfp8":
            assert (a[2:] / b[2:]).mean() < 0.995, spec


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_make_outputs_better(dtype):
    w = weights_of(dtype=dtype)
    for spec in specs("imatrix"):
        moments = moments_of(spec.group_size)
        rtn = quantize_rows(w, QuantSpec.make(spec.mode, spec.bits, spec.group_size))
        found = quantize_rows(w, spec, moments=moments)
        a, b = (output_errors(w, parts, spec, moments) for parts in (found, rtn))
        assert (a[2:] / b[2:]).mean() < (0.8 if spec.mode == "affine" else 0.85), spec


def slow_descent(w, q, s, b, m, n):
    """Codes that no single change improves, by trying them all."""
    while True:
        e = w - s * q - b
        best, where = e @ m @ e * (1 - 1e-6), None
        for i in range(len(w)):
            for step in (-1, 1):
                if 0 <= q[i] + step <= n:
                    e[i] -= s * step
                    if e @ m @ e < best:
                        best, where = e @ m @ e, (i, step)
                    e[i] += s * step
        if where is None:
            return q
        q[where[0]] += where[1]


@pytest.mark.parametrize("bits", [2, 4])
def test_descent_comes_close_to_trying_every_change(bits):
    spec = QuantSpec.make("affine", bits, 32, "imatrix")
    w, moments = weights_of()[3:], moments_of(32)
    found = quantize_rows(w, spec, moments=moments)
    errors = output_errors(w, found, spec, moments)
    plain = quantize_rows(w, QuantSpec.make("affine", bits, 32, "search"))
    codes = unpack_rows(plain["weight"], bits).astype(np.float64)
    for r, g in ((0, 0), (1, 5), (2, 3)):
        at = slice(32 * g, 32 * g + 32)
        s, b = (float(plain[role][r, g]) for role in ("scales", "biases"))
        x = w[r, at].astype(np.float64)
        m = moments[g].astype(np.float64)
        slow = slow_descent(x, codes[r, at].copy(), s, b, m, 2**bits - 1)
        e = x - s * slow - b
        assert errors[r, g] < e @ m @ e


@pytest.mark.parametrize(("bits", "group"), [*AFFINE, (5, 64), (6, 128)])
def test_no_change_of_one_code_makes_the_output_better(bits, group):
    spec = QuantSpec.make("affine", bits, group, "imatrix")
    w, moments = weights_of(rows=70)[3:], moments_of(group)
    parts = quantize_rows(w, spec, moments=moments)
    m = search.damped(moments).astype(np.float64)
    codes = unpack_rows(parts["weight"], bits).reshape(len(w), -1, group).astype(np.int64)
    error = (w.astype(np.float64) - values(parts, spec)).reshape(codes.shape)
    scale = parts["scales"].astype(np.float64)[..., None]
    pull = 2 * scale * np.einsum("rgi,gij->rgj", error, m)
    cost = np.square(scale) * m.diagonal(axis1=1, axis2=2)
    for step in (-1, 1):
        allowed = (codes + step >= 0) & (codes + step < 2**bits)
        assert (cost - step * pull > -1e-3 * cost)[allowed].all(), step


@pytest.mark.parametrize("mode", MICROSCALED)
def test_no_other_code_makes_the_output_of_a_microscaled_group_better(mode):
    spec = QuantSpec.make(mode, method="imatrix")
    group, w = spec.group_size, weights_of(rows=70)[3:]
    moments = moments_of(group)
    parts = quantize_rows(w, spec, moments=moments)
    m = search.damped(moments).astype(np.float64)
    error = (w.astype(np.float64) - values(parts, spec)).reshape(len(w), -1, group)
    pull = np.einsum("rgi,gij->rgj", error, m)
    cost = m.diagonal(axis1=1, axis2=2)
    if mode == "nvfp4":
        scale = parts["scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float64)[..., None]
    else:
        scale = np.exp2(parts["scales"].astype(np.float64) - 127)[..., None]
    now = values(parts, spec).reshape(error.shape)
    lattice = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    if mode == "mxfp8":
        lattice = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for value in np.concatenate([-lattice, lattice]):
        move = value * scale - now
        gain = move * (2 * pull - move * cost)
        assert (gain <= 1e-3 * np.square(scale) * cost).all(), value


def slow_best(w, v, spec, dtype):
    """The least weighted error of one group over a dense grid of scales and fitted biases."""
    n = 2**spec.bits - 1
    best = np.inf
    for shrink in np.linspace(0.5, 1.15, 261):
        s = (w.max() - w.min()) / n * shrink
        b = (w.max() + w.min()) / 2 - s * n / 2
        for _ in range(3):
            q = np.clip(np.rint((w - b) / s), 0, n)
            mean = (v * q).sum() / v.sum()
            spread = (v * np.square(q - mean)).sum()
            s = (v * (q - mean) * w).sum() / spread if spread else s
            s = float(np.asarray(s, np.float32).astype(dtype))
            b = float(np.asarray((v * (w - s * q)).sum() / v.sum(), np.float32).astype(dtype))
            q = np.clip(np.rint((w - b) / s), 0, n)
            best = min(best, (v * np.square(w - s * q - b)).sum())
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_error_is_close_to_an_exhaustive_search(bits):
    spec = QuantSpec.make("affine", bits, 64, "search")
    w, v = weights_of()[3:], np.ones(256)
    found = group_errors(w, quantize_rows(w, spec), spec, v)
    groups = w.astype(np.float64).reshape(len(w), -1, 64)
    best = [
        [slow_best(g, v[i * 64 :][:64], spec, w.dtype) for i, g in enumerate(r)] for r in groups
    ]
    assert (found / best).mean() <= 1.25


def test_block_exponent_is_the_best_of_three():
    spec = QuantSpec.make("mxfp4", method="search")
    w, v = weights_of(seed=3), np.ones(256)
    found = quantize_rows(w, spec)
    first = quantize_rows(w, QuantSpec.make("mxfp4"))["scales"].astype(int)
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    lattice = np.concatenate([-fp4, fp4])
    least = np.full(first.shape, np.inf)
    for down in range(3):
        scale = np.repeat(np.exp2(first - 127.0 - down), 32, 1)
        near = np.abs(w.astype(np.float64)[..., None] - scale[..., None] * lattice).min(-1)
        error = (v * near**2).reshape(len(w), -1, 32).sum(-1)
        least = np.where(first - down >= 0, np.minimum(least, error), least)
    assert np.allclose(group_errors(w, found, spec, v), least, rtol=1e-4)
    assert (found["scales"].astype(int) < first).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_scale_is_the_best_of_eight(dtype):
    spec = QuantSpec.make("nvfp4", method="search")
    w, v = weights_of(rows=70, dtype=dtype, seed=3), np.ones(256)
    found = quantize_rows(w, spec)
    first = quantize_rows(w, QuantSpec.make("nvfp4"))["scales"].astype(int)
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    lattice = np.concatenate([-fp4, fp4])
    least = np.full(first.shape, np.inf)
    for step in range(-5, 3):
        code = first + step
        there = (code > 0) & (code < 127) | (step == 0)
        scale = np.where(there, code, 0).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        scale = np.repeat(scale.astype(np.float64), 16, 1)
        near = np.abs(w.astype(np.float64)[..., None] - scale[..., None] * lattice).min(-1)
        error = (v * near**2).reshape(len(w), -1, 16).sum(-1)
        least = np.where(there, np.minimum(least, error), least)
    assert np.allclose(group_errors(w, found, spec, v), least, rtol=1e-4, atol=0)
    assert len(np.unique(found["scales"].astype(int) - first)) > 4


def test_rows_do_not_depend_on_their_neighbours():
    w = weights_of(rows=9, columns=512)
    for spec in specs("imatrix"):
        m = moments_of(spec.group_size, 512)
        whole = quantize_rows(w, spec, moments=m)
        for cut in (1, 4):
            halves = [quantize_rows(part.copy(), spec, moments=m) for part in (w[:cut], w[cut:])]
            for role, part in whole.items():
                assert np.concatenate([half[role] for half in halves]).tobytes() == part.tobytes()


def test_moments_of_nothing_are_no_moments():
    w = weights_of()
    for spec in specs("imatrix"):
        size = spec.group_size
        plain = QuantSpec.make(spec.mode, spec.bits, size, "search")
        a = quantize_rows(w, plain)
        b = quantize_rows(w, spec, moments=np.zeros((256 // size, size, size), np.float32))
        assert all(a[role].tobytes() == b[role].tobytes() for role in a)
        c, d = (
            quantize_rows(w, spec, moments=factor * moments_of(size)) for factor in (1.0, 1024.0)
        )
        assert all(c[role].tobytes() == d[role].tobytes() for role in c)


def test_stacked_matrices_have_moments_of_their_own():
    spec = QuantSpec.make("affine", 3, 32, "imatrix")
    w = weights_of(rows=8).reshape(2, 4, 256)
    moments = np.stack([moments_of(32, seed=seed) for seed in (1, 2)])
    both = quantize_rows(w, spec, moments=moments)
    for index in range(2):
        one = quantize_rows(w[index].copy(), spec, moments=moments[index])
        assert all(both[role][index].tobytes() == one[role].tobytes() for role in one)


def test_narrowed_blocks_are_those_of_the_whole_matrix():
    matrices = np.random.default_rng(0).standard_normal((3, 256, 256))
    wide = np.stack([diagonal_blocks(matrix, 128) for matrix in matrices])
    for size in (16, 32, 64, 128):
        found = narrowed(wide, size)
        for matrix, blocks in zip(matrices, found, strict=True):
            assert (blocks == diagonal_blocks(matrix, size)).all()
            assert (blocks[3 % len(blocks)].shape) == (size, size)


def test_odd_group_counts_of_nvfp4():
    w = weights_of(columns=48)
    parts = quantize_rows(w, QuantSpec.make("nvfp4", method="search"))
    assert parts["weight"].shape == (6, 6)
    assert np.isfinite(dequantize_rows(parts, QuantSpec.make("nvfp4"), "F32")).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(bad):
    for spec in specs("search"):
        w = weights_of(rows=2048, columns=256)
        w[1500, 77] = bad
        with pytest.raises(NonFiniteError, match="row 1500, column 77"):
            quantize_rows(w, spec)
