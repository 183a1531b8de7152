"""Quantized weights, decoded as their own libraries decode them, and repacked for MLX."""

import json
from pathlib import Path

import numpy as np
import pytest
from quantized_helpers import LINEAR, release, rows_of, stored_of, view_of
from safetensors import safe_open

from quant.weights import dequantize_rows

FIXTURES = sorted((Path(__file__).parent / "fixtures" / "quantized").glob("*.safetensors"))
WEIGHT = f"{LINEAR}.weight"
CODES = {"float32": "F32", "float16": "F16"}
NATIVE = {
    "gptq-2": "affine 2",
    "gptq-2-sym": "affine 2",
    "gptq-3": "affine 3",
    "gptq-3-sym": "affine 3",
    "gptq-4": "affine 4",
    "gptq-4-sym": "affine 4",
    "gptq-8": "affine 8",
    "gptq-8-sym": "affine 8",
    "awq": "affine 4",
    "ct-int4-sym": "affine 4",
    "ct-int4-asym": "affine 4",
    "ct-int8-channel": "affine 8",
    "ct-int8-plain": "affine 8",
    "ct-int2": "affine 2",
    "ct-mxfp4": "mxfp4 4",
    "ct-mxfp8": "mxfp8 8",
    "bnb-int8": "affine 8",
}
"""What each fixture is kept as; the others have no counterpart."""


def opened(fixture, folder):
    with safe_open(fixture, "pt") as file:
        metadata = file.metadata()
        names = [name for name in file.keys() if name != "expected"]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
        expected = file.get_tensor("expected").numpy()
    release(folder, tensors, json.loads(metadata["settings"]), dtype=metadata["dtype"])
    return expected, CODES[metadata["dtype"]]


@pytest.mark.parametrize("step", [None, 5])
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda file: file.stem)
def test_decoded_as_the_formats_own_library_does(fixture, step, tmp_path):
    expected, _ = opened(fixture, tmp_path)
    view = view_of(tmp_path, expected.shape)
    assert set(view.source.tensors) == {WEIGHT}
    assert view.source.tensors[WEIGHT].shape == expected.shape
    assert "quantization_config" not in view.source.config
    rows = rows_of(tmp_path, view, step=step)
    if fixture.stem == "bnb-int8":  # the library multiplies twice, by SCB and by 1/127
        np.testing.assert_allclose(rows, expected, rtol=2.0**-22)
    else:
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda file: file.stem)
def test_kept_codes_mean_the_same_to_mlx(fixture, tmp_path):
    import mlx.core as mx

    expected, dtype = opened(fixture, tmp_path)
    view = view_of(tmp_path, expected.shape)
    native = view.coded[WEIGHT].native
    found = None if native is None else f"{native.spec.mode} {native.spec.bits}"
    assert found == NATIVE.get(fixture.stem)
    if native is None:
        return
    parts = stored_of(tmp_path, view, "F32", step=7)
    spec = native.spec
    values = mx.dequantize(
        *(mx.array(parts[role]) for role in ("weight", "scales", "biases") if role in parts),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )
    # MLX rounds the product before it adds the bias, so float32 differs in its last bits.
    np.testing.assert_allclose(np.array(values), expected, rtol=0, atol=_ulps(expected, dtype))
    own = dequantize_rows(parts, spec, "F32")
    np.testing.assert_array_equal(own, np.array(values))


@pytest.mark.parametrize("columns", [8, 5000])
def test_columns_are_read_as_they_lie(columns, tmp_path):
    """Short rows whole, long ones in part."""
    import torch

    from converter.source import open_folder

    stored = torch.arange(3 * columns, dtype=torch.int32).reshape(3, columns)
    release(tmp_path, {"x": stored, "y": torch.zeros(1)}, {})
    with open_folder(tmp_path).open() as raw:
        for start, stop in ((0, columns), (1, 4), (columns - 2, columns), (3, 3)):
            found = raw.read_columns("x", start, stop)
            np.testing.assert_array_equal(found, stored.numpy()[:, start:stop])


def _ulps(expected, dtype):
    """Half a last place of the library's own result, and a few of float32."""
    largest = float(np.abs(expected.astype(np.float64)).max())
    return largest * (2.0**-11 if dtype == "F16" else 2.0**-20)
