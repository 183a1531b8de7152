"""Tuned codes and grids: against the loss they are to lower, and against mx.quantize's reading."""

import ml_dtypes
import numpy as np
import pytest

from quant.gptq import quantize_gptq, values_of
from quant.packing import pack_rows, unpack_rows
from quant.recipe import QuantSpec
from quant.tune import TunedMatrix, Tuning

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def problem(spec, dtype=ml_dtypes.bfloat16, rows=24, columns=192):
    """A matrix and its stored tensors by GPTQ."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((rows, columns)) * 0.02).astype(dtype)
    return w, quantize_gptq(w, spec, np.eye(columns))


def values(matrix, shape):
    out = np.empty(shape, np.float32)
    matrix.values(out)
    return out


def towards(target, w, parts, spec, tuning):
    """The matrix tuned down the gradient of its squared distance from ``target``."""
    matrix = TunedMatrix(w, parts, spec)
    for number in range(tuning.iterations):
        matrix.step(values(matrix, w.shape) - target, tuning, number)
    return matrix


@pytest.mark.parametrize(("bits", "size"), [(2, 64), (2, 32), (3, 64), (4, 128)])
def test_codes_follow_the_gradient_to_what_can_be_stored(bits, size):
    spec = QuantSpec.make("affine", bits, size, "autoround")
    w, parts = problem(spec, columns=256)
    codes = unpack_rows(parts["weight"], bits).astype(np.int64)
    moved = np.random.default_rng(1).integers(-1, 2, codes.shape)
    wanted = np.clip(codes + moved, 0, 2**bits - 1).astype(np.uint8)
    target = values_of(parts | {"weight": pack_rows(wanted, bits)}, spec)
    found = towards(target, w, parts, spec, Tuning(iterations=100, reach=2.0, grid_reach=0.0))
    assert (wanted != codes).any()
    assert np.array_equal(unpack_rows(found.parts()["weight"], bits), wanted)
    assert np.array_equal(values(found, w.shape), target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grids_follow_the_gradient(dtype):
    spec = QuantSpec.make("affine", 2, 64, "autoround")
    w, parts = problem(spec, DTYPES[dtype])
    unit = np.abs(parts["scales"].astype(np.float32))
    rng = np.random.default_rng(1)
    shifted = {
        role: (parts[role] + unit * rng.uniform(-0.06, 0.06, unit.shape)).astype(np.float32)
        for role in ("scales", "biases")
    }
    target = values_of(parts | shifted, spec)
    found = towards(target, w, parts, spec, Tuning(iterations=200, reach=0.0)).parts()
    before, after = (np.square(values_of(p, spec) - target).sum() for p in (parts, found))
    assert found["weight"].tobytes() == parts["weight"].tobytes()
    assert after < 0.05 * before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_is_tuned_is_what_is_stored(bits, dtype):
    import mlx.core as mx

    spec = QuantSpec.make("affine", bits, 64, "autoround")
    w, parts = problem(spec, DTYPES[dtype])
    start = TunedMatrix(w, parts, spec)
    assert {r: a.tobytes() for r, a in start.parts().items()} == {
        role: part.tobytes() for role, part in parts.items()
    }
    matrix = towards(np.flip(w.astype(np.float32)), w, parts, spec, Tuning(iterations=5))
    found = matrix.parts()
    assert found["scales"].dtype == DTYPES[dtype]
    wide = (mx.array(found[role].astype(np.float32)) for role in ("scales", "biases"))
    expected = np.array(mx.dequantize(mx.array(found["weight"]), *wide, group_size=64, bits=bits))
    assert np.array_equal(values(matrix, w.shape), expected)


def test_places_reach_the_last_codes_and_no_further():
    spec = QuantSpec.make("affine", 2, 64, "autoround")
    w, parts = problem(spec)
    matrix, tuning = TunedMatrix(w, parts, spec), Tuning(iterations=1, reach=9.0, grid_reach=0.0)
    scales = np.repeat(parts["scales"].astype(np.float32), 64, axis=1)
    before = values(matrix, w.shape)
    matrix.step(-np.sign(scales), tuning, 0)
    top = values(matrix, w.shape)
    matrix.step(np.sign(scales), tuning, 0)
    bottom = values(matrix, w.shape)
    biases = np.repeat(parts["biases"].astype(np.float32), 64, axis=1)
    assert np.array_equal(bottom, biases)
    assert np.array_equal(top, scales * 3 + biases)
    assert (before != bottom).any()
    assert (before != top).any()


def test_what_has_no_gradient_stays():
    spec = QuantSpec.make("affine", 2, 64, "autoround")
    w, parts = problem(spec)
    matrix = TunedMatrix(w, parts, spec)
    for number in range(4):
        matrix.step(np.zeros(w.shape, np.float32), Tuning(iterations=4), number)
    assert all(a.tobytes() == parts[role].tobytes() for role, a in matrix.parts().items())


@pytest.mark.parametrize(("iterations", "count"), [(200, 64), (6, 3), (5, 1)])
def test_steps_shrink_and_every_sequence_has_its_turn(iterations, count):
    tuning = Tuning(iterations=iterations)
    shares = [tuning.share(number) for number in range(iterations)]
    assert sum(shares) == pytest.approx(1)
    assert (np.diff(shares) < 0).all()
    seen = [row for number in range(iterations) for row in tuning.batch(number, count)]
    counts = np.bincount(seen, minlength=count)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(tuning.batch(n, count))) == min(2, count) for n in range(iterations))
