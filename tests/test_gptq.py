"""GPTQ against a slow reference in float64, and against the error that it is to reduce."""

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from quant.gptq import inverse_factor, quantize_gptq
from quant.moments import diagonal_blocks
from quant.packing import unpack_rows
from quant.recipe import QuantSpec
from quant.weights import dequantize_rows, quantize_rows

SPECS = [
    *(QuantSpec.make("affine", bits, 64, "gptq") for bits in (2, 3, 4, 8)),
    QuantSpec.make("mxfp4", method="gptq"),
    QuantSpec.make("mxfp8", method="gptq"),
    QuantSpec.make("nvfp4", method="gptq"),
]


def problem(rows=24, columns=192, seed=0):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32)
    basis = rng.standard_normal((columns // 4, columns))
    x = rng.standard_normal((1500, columns // 4)) @ basis + rng.standard_normal((1500, columns))
    x *= rng.lognormal(0, 0.7, columns)
    return w.astype(ml_dtypes.bfloat16), x.T @ x / len(x)


def loss(w, parts, spec, hessian):
    d = w.astype(np.float64) - dequantize_rows(widened(parts, spec), spec, "F32")
    return np.einsum("ri,ij,rj->", d, hessian, d)


def widened(parts, spec):
    roles = ("scales", "biases") if spec.mode == "affine" else ()
    return {r: p.astype(np.float32) if r in roles else p for r, p in parts.items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}{s.bits}")
def test_output_error_falls(spec):
    w, hessian = problem()
    moments = diagonal_blocks(hessian, spec.group_size)
    grid = QuantSpec.make(spec.mode, spec.bits, spec.group_size, "imatrix")
    before = loss(w, quantize_rows(w, grid, moments=moments), spec, hessian)
    after = loss(w, quantize_gptq(w, spec, hessian), spec, hessian)
    assert after < 0.75 * before


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}{s.bits}")
def test_independent_columns_give_the_searched_grid(spec):
    w, _ = problem()
    grid = QuantSpec.make(spec.mode, spec.bits, spec.group_size, "imatrix")
    identity = np.eye(w.shape[1])
    expected = quantize_rows(w, grid, moments=diagonal_blocks(identity, spec.group_size))
    found = quantize_gptq(w, spec, identity)
    grids = [role for role in expected if role != "weight"]
    assert all(found[role].tobytes() == expected[role].tobytes() for role in grids)
    ours, theirs = (unpack_rows(parts["weight"], spec.bits) for parts in (found, expected))
    assert (ours == theirs).mean() > 0.999  # near ties may fall either way


def test_codes_are_those_of_the_plain_algorithm():
    spec = QuantSpec.make("affine", 3, 64, "gptq")
    w, hessian = problem()
    parts = quantize_gptq(w, spec, hessian)
    scale, bias = (np.repeat(parts[r].astype(np.float64), 64, 1) for r in ("scales", "biases"))
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    h = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    left, remaining = list(order), w.astype(np.float64)
    codes = np.zeros(w.shape)
    while left:  # one column at a time, the inverse of what is left made anew each time
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        q = np.clip(np.rint((remaining[:, j] - bias[:, j]) / scale[:, j]), 0, 7)
        error = (remaining[:, j] - scale[:, j] * q - bias[:, j]) / inverse[0, 0]
        remaining[:, left] -= np.outer(error, inverse[0])
        codes[:, j] = q
        left = left[1:]
    same = unpack_rows(parts["weight"], 3) == codes
    assert same.mean() > 0.995  # float32 may decide a near tie differently, and then its row


def test_factor_is_that_of_the_damped_inverse():
    _, hessian = problem()
    order, factor = inverse_factor(hessian, damping=0.05)
    damped = hessian + 0.05 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    assert np.allclose(np.triu(factor), factor)
    product = (factor.astype(np.float64).T @ factor) @ damped[order][:, order]
    assert np.allclose(product, np.eye(len(hessian)), atol=1e-3)
    assert (np.diff(np.diagonal(hessian)[order]) <= 0).all()


def test_dead_and_dependent_columns():
    w, hessian = problem()
    hessian[:, 7] = hessian[7] = 0.0
    hessian[:, 9], hessian[9] = hessian[:, 8], hessian[8]
    hessian[9, 9] = hessian[8, 8]
    for spec in SPECS:
        parts = quantize_gptq(w, spec, hessian)
        assert np.isfinite(dequantize_rows(widened(parts, spec), spec, "F32")).all()
    nothing = quantize_gptq(w, SPECS[2], np.zeros_like(hessian))
    search = quantize_rows(w, QuantSpec.make("affine", 4, 64, "search"))
    assert nothing["weight"].tobytes() == search["weight"].tobytes()


def test_sums_do_not_depend_on_the_number_of_threads(monkeypatch):
    """A factor whose last bit moves flips codes, and those every later block's."""
    seen = []
    stock = np.linalg.cholesky

    def cholesky(matrix):
        seen.extend(one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas")
        return stock(matrix)

    monkeypatch.setattr(np.linalg, "cholesky", cholesky)
    with threadpool_limits(limits=2, user_api="blas"):
        inverse_factor(np.eye(8))
        after = [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]
    assert seen
    assert set(seen) == {1}
    assert 2 in after
