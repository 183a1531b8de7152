"""Weights that lie on a grid keep it; all others get the bytes that they always got."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from quant import kernels_affine
from quant.floats import KINDS
from quant.recipe import QuantSpec
from quant.weights import dequantize_rows, quantize_rows

ROWS, COLUMNS = 48, 256
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def trained(dtype, seed=0):
    """What QAT for Q4_0 leaves: weights on its grid, rounded to bfloat16."""
    weight = np.random.default_rng(seed).normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float32)
    blocks = quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    values = dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    return values.astype(ml_dtypes.bfloat16).astype(dtype), blocks


def codes_of(blocks):
    packed = blocks.reshape(ROWS, -1, 18)[..., 2:]
    return np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(ROWS, COLUMNS)


def quantized(w, spec):
    """Codes, and the values they stand for in float32 arithmetic."""
    parts = quantize_rows(w, spec)
    wide = {k: v if k == "weight" else v.astype(np.float32) for k, v in parts.items()}
    values = dequantize_rows(wide, spec, "F32")
    scale = np.repeat(wide["scales"], spec.group_size, axis=1)
    bias = np.repeat(wide["biases"], spec.group_size, axis=1)
    return np.rint((values - bias) / scale).astype(np.uint8), values


def plain(monkeypatch):
    for name in ("quant.affine.keep_lattice", "quant.search.keep_codes"):
        monkeypatch.setattr(name, lambda *args, **kwargs: None)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_trained_grid_is_kept_exactly(dtype):
    """The values come back to the last bit of the bfloat16 that the release stores."""
    w, blocks = trained(TYPES[dtype])
    codes, values = quantized(w, QuantSpec.make("affine", 4, 32))
    back = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(back, w.astype(np.float32))
    np.testing.assert_array_equal(codes, codes_of(blocks))


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_bfloat16_scales_keep_the_codes_of_a_grid(method, monkeypatch):
    """A step of more than eight bits is rounded, and nothing else is lost."""
    w, blocks = trained(TYPES["bfloat16"])
    spec = QuantSpec.make("affine", 4, 32, method)
    codes, values = quantized(w, spec)
    np.testing.assert_array_equal(codes, codes_of(blocks))
    error = np.square(values - w.astype(np.float32)).mean()
    plain(monkeypatch)
    _, before = quantized(w, spec)
    assert error < 0.01 * np.square(before - w.astype(np.float32)).mean()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("top", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric_grids_of_all_widths(bits, top, sign):
    """Whether or not the grid has its lowest value, and on either side of zero."""
    rng = np.random.default_rng(bits)
    edge = 2 ** (bits - 1) - top
    k = rng.integers(-edge, edge + top, (ROWS, COLUMNS // 64, 64))
    k[..., 0] = -edge
    steps = 2.0 ** rng.integers(-12, -4, k.shape[:2])
    w = (sign * k * steps[..., None]).reshape(ROWS, COLUMNS).astype(ml_dtypes.bfloat16)
    _, values = quantized(w, QuantSpec.make("affine", bits, 64))
    np.testing.assert_array_equal(values, w.astype(np.float32))


def test_two_steps_in_one_group_are_no_grid(monkeypatch):
    w, _ = trained(TYPES["bfloat16"])
    spec = QuantSpec.make("affine", 4, 64)
    found = quantize_rows(w, spec)
    plain(monkeypatch)
    for role, part in quantize_rows(w, spec).items():
        np.testing.assert_array_equal(found[role], part)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_weights_get_the_same_bytes(bits, dtype, monkeypatch):
    w = np.random.default_rng(1).normal(0, 0.02, (ROWS, COLUMNS)).astype(TYPES[dtype])
    w[:, :64] = 0
    spec = QuantSpec.make("affine", bits, 32)
    found = quantize_rows(w, spec)
    plain(monkeypatch)
    for role, part in quantize_rows(w, spec).items():
        np.testing.assert_array_equal(found[role], part)


def test_rows_do_not_depend_on_each_other():
    w, _ = trained(TYPES["float32"])
    w[::3] = np.random.default_rng(3).normal(0, 0.02, w[::3].shape)
    spec = QuantSpec.make("affine", 4, 32)
    whole = quantize_rows(w, spec)
    for row in range(ROWS):
        for role, part in quantize_rows(w[row : row + 1], spec).items():
            np.testing.assert_array_equal(part[0], whole[role][row])


def test_mlx_has_no_part_in_it():
    """Method "mlx" stays bit for bit mx.quantize."""
    import mlx.core as mx

    w, _ = trained(TYPES["bfloat16"])
    parts = quantize_rows(w, QuantSpec.make("affine", 4, 32, "mlx"))
    theirs = mx.quantize(mx.array(w.astype(np.float32)).astype(mx.bfloat16), 32, 4)
    for role, their in zip(("weight", "scales", "biases"), theirs, strict=True):
        own = parts[role] if role == "weight" else parts[role].astype(np.float32)
        their = their if role == "weight" else their.astype(mx.float32)
        np.testing.assert_array_equal(own, np.array(their), err_msg=role)


def test_microscaled_grids_are_exact_as_they_are():
    rng = np.random.default_rng(2)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    steps = 2.0 ** rng.integers(-9, 3, (ROWS, COLUMNS // 32, 1))
    w = values[rng.integers(0, 8, (ROWS, COLUMNS // 32, 32))] * steps
    w = (w * rng.choice([-1, 1], w.shape)).reshape(ROWS, COLUMNS).astype(ml_dtypes.bfloat16)
    spec = QuantSpec.make("mxfp4")
    back = dequantize_rows(quantize_rows(w, spec), spec, "BF16")
    np.testing.assert_array_equal(back.astype(np.float32), w.astype(np.float32))


def test_edges_keep_their_sign():
    """A search finds the grid by the value of largest magnitude, as plain rounding does."""
    w = np.zeros((3, 64), ml_dtypes.bfloat16)
    w[:, :8] = [1, -3, 2, 0, 0.5, 0.25, -0.5, 3.5]
    w[1] *= -1
    w[:, 32:40] = [0, -0.5, 0.25, 0.375, 0, 0, 0.125, -0.125]
    bits = w.view(np.uint16)
    codes, (scales, biases, edges) = np.empty(w.shape, np.uint8), np.empty((3, 3, 2), np.uint16)
    ones, levels, clips = np.ones(64, np.float32), np.float32(15), np.zeros(1, np.float32)
    search = kernels_affine.affine_search(KINDS["BF16"], 32)
    assert search(bits, ones, levels, clips, True, codes, scales, biases, edges) == -1
    plain = quantize_rows(w, QuantSpec.make("affine", 4, 32))
    np.testing.assert_array_equal(edges, plain["biases"].view(np.uint16))
    found = edges.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found, [[3.5, -0.5], [-3.5, -0.5], [3.5, -0.5]])
