"""Searched scales and biases: against a slow reference, and never worse than round to nearest."""

import ml_dtypes
import numpy as np
import pytest

from quant.errors import NonFiniteError
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
    from quant.packing import unpack_rows

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


def importance_of(columns=256, seed=1):
    return np.random.default_rng(seed).lognormal(0, 1.5, columns).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["search", "imatrix"])
def test_no_group_is_worse_than_round_to_nearest(dtype, method):
    w = weights_of(dtype=dtype)
    v = importance_of() if method == "imatrix" else None
    for spec in specs(method):
        rtn = quantize_rows(w, QuantSpec.make(spec.mode, spec.bits, spec.group_size))
        found = quantize_rows(w, spec, weights=v)
        importance = np.ones(256) if v is None else v.astype(np.float64)
        a, b = (group_errors(w, parts, spec, importance) for parts in (found, rtn))
        assert (a <= b * (1 + 1e-5) + 1e-18).all(), spec
        if spec.mode != "mxfp8":
            assert (a[2:] / b[2:]).mean() < 0.995, spec


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
    spec = QuantSpec.make("affine", bits, 64, "imatrix")
    w, v = weights_of()[3:], importance_of()
    found = group_errors(w, quantize_rows(w, spec, weights=v), spec, v.astype(np.float64))
    groups = w.astype(np.float64).reshape(len(w), -1, 64)
    best = [
        [slow_best(g, v.astype(np.float64)[i * 64 :][:64], spec, w.dtype) for i, g in enumerate(r)]
        for r in groups
    ]
    assert (found / best).mean() <= 1.25


def test_block_exponent_is_the_best_of_three():
    spec = QuantSpec.make("mxfp4", method="imatrix")
    w, v = weights_of(seed=3), importance_of()
    found = quantize_rows(w, spec, weights=v)
    first = quantize_rows(w, QuantSpec.make("mxfp4"))["scales"].astype(int)
    fp4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    lattice = np.concatenate([-fp4, fp4])
    least = np.full(first.shape, np.inf)
    for down in range(3):
        scale = np.repeat(np.exp2(first - 127.0 - down), 32, 1)
        near = np.abs(w.astype(np.float64)[..., None] - scale[..., None] * lattice).min(-1)
        error = (v.astype(np.float64) * near**2).reshape(len(w), -1, 32).sum(-1)
        least = np.where(first - down >= 0, np.minimum(least, error), least)
    assert np.allclose(group_errors(w, found, spec, v.astype(np.float64)), least, rtol=1e-4)
    assert (found["scales"].astype(int) < first).any()


def test_rows_do_not_depend_on_their_neighbours():
    w, v = weights_of(rows=9, columns=512), importance_of(512)
    for spec in specs("imatrix"):
        whole = quantize_rows(w, spec, weights=v)
        for cut in (1, 4):
            halves = [quantize_rows(part.copy(), spec, weights=v) for part in (w[:cut], w[cut:])]
            for role, part in whole.items():
                assert np.concatenate([half[role] for half in halves]).tobytes() == part.tobytes()


def test_equal_weights_and_no_weights_agree():
    w = weights_of()
    for spec in specs("imatrix"):
        plain = QuantSpec.make(spec.mode, spec.bits, spec.group_size, "search")
        a = quantize_rows(w, spec, weights=np.full(256, 7.0, np.float32))
        b = quantize_rows(w, plain)
        assert all(a[role].tobytes() == b[role].tobytes() for role in a)
        c = quantize_rows(w, spec, weights=np.zeros(256, np.float32))
        assert all(a[role].tobytes() == c[role].tobytes() for role in a)


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
