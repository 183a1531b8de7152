"""Bit for bit against mx.quantize and mx.dequantize on CPU."""

import ml_dtypes
import numpy as np
import pytest

from arch_maps.dtypes import CODES, NUMPY_DTYPES
from quant.errors import NonFiniteError
from quant.floats import cast
from quant.microscaling import ROUNDING_RULES
from quant.packing import pack_rows
from quant.recipe import QuantSpec
from quant.weights import dequantize_rows, quantize_rows

FLOATS = ["F32", "F16", "BF16"]
SETTINGS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
SETTINGS += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
ROWS, COLUMNS = 8, 256


def to_mlx(array):
    import mlx.core as mx

    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def from_mlx(array):
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def stock_quantize(w, spec):
    import mlx.core as mx

    parts = mx.quantize(
        to_mlx(w), group_size=spec.group_size, bits=spec.bits, mode=spec.mode, stream=mx.cpu
    )
    return dict(zip(("weight", "scales", "biases"), map(from_mlx, parts), strict=False))


def stock_dequantize(parts, spec, code):
    import mlx.core as mx

    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[code]
    values = mx.dequantize(
        *map(to_mlx, parts.values()),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=dtype,
        stream=mx.cpu,
    )
    return from_mlx(values)


def same_bytes(got, expected):
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and got.tobytes() == expected.tobytes()
    )


def same_values(got, expected):
    got, expected = got.astype(np.float32), expected.astype(np.float32)
    return bool(((got == expected) | (np.isnan(got) & np.isnan(expected))).all())


def weights_of_many_kinds():
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((ROWS, COLUMNS))
    outlier = normal * 0.01
    outlier[:, 3::64] *= 100
    holes = normal.copy()
    holes[:, 64:128] = 0
    holes[:, ::32] = 3
    return {
        "gaussian": normal * 0.02,
        "uniform": rng.uniform(-1, 1, normal.shape),
        "positive": np.abs(normal),
        "negative": -np.abs(normal) - 0.5,
        "constant": np.full_like(normal, 0.37),
        "negative constant": np.full_like(normal, -0.37),
        "zero": np.zeros_like(normal),
        "negative zero": -np.zeros_like(normal),
        "zero groups": holes,
        "halves": rng.integers(0, 31, normal.shape) / 2,
        "integers": rng.integers(-8, 8, normal.shape),
        "eighths": rng.integers(-48, 49, normal.shape) / 8,
        "outliers": outlier,
        "below the least scale": normal * 1e-7,
        "normal to denormal": normal * 1e-38,
        "denormal": normal * 1e-40,
        "every magnitude": normal * np.exp(rng.standard_normal(normal.shape) * 8),
        "large": normal * 1e4,
        "near the largest": normal * 3e37,
        "wider than float32": np.sign(normal) * 3e38,
    }


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("kind", weights_of_many_kinds())
def test_method_mlx_is_bit_identical_to_mx_quantize(code, kind):
    with np.errstate(over="ignore"):
        w = weights_of_many_kinds()[kind].astype(np.float32).astype(NUMPY_DTYPES[code])
    w[~np.isfinite(w)] = 0  # beyond float16: what is left still spans its range
    for mode, bits, group_size in SETTINGS:
        spec = QuantSpec.make(mode, bits, group_size, "mlx")
        parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
        assert parts.keys() == expected.keys()
        for suffix, part in parts.items():
            assert same_bytes(part, expected[suffix]), (mode, bits, group_size, suffix)
        targets = [code] if mode == "affine" else FLOATS
        for target in targets:
            values = dequantize_rows(parts, spec, target)
            assert same_values(values, stock_dequantize(parts, spec, target)), (mode, bits, target)


@pytest.mark.parametrize("code", ["F16", "BF16"])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_half_precision_value_as_the_largest_of_its_block(code, mode):
    spec = QuantSpec.make(mode, method="mlx")
    infinity = {"F16": 0x7C00, "BF16": 0x7F80}[code]
    every = np.arange(infinity, dtype=np.uint16).view(NUMPY_DTYPES[code]).reshape(-1, 2)
    w = np.zeros((len(every), 2 * spec.group_size), NUMPY_DTYPES[code])
    for half in (0, 1):
        first = w[:, half * spec.group_size :]
        amax = every[:, half].astype(np.float32)
        for i, factor in enumerate((1, -1, 0.4166, 0.2917, -0.2083, 0.125, -0.0417)):
            first[:, i] = amax * np.float32(factor)
    parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
    assert same_bytes(parts["scales"], expected["scales"])
    assert same_bytes(parts["weight"], expected["weight"])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float32_block_maxima_beside_every_scale_boundary(mode):
    spec = QuantSpec.make(mode, method="mlx")
    top = 448 if mode == "mxfp8" else 6
    edges = [top * 2.0**k * m for k in range(-150, 125) for m in (1, 1.0625, 1.1875)]
    bits = np.array([e for e in edges if e < 3e38], np.float32).view(np.int32)
    steps = np.array([-9, -2, -1, 0, 1, 2, 9])
    amax = (bits[:, None] + steps).clip(0).astype(np.int32).view(np.float32).reshape(-1, 1)
    w = np.zeros((len(amax), 64), np.float32)
    w[:, ::16] = amax
    w[:, 1::16] = amax * np.float32(-0.3)
    parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
    assert same_bytes(parts["scales"], expected["scales"])
    assert same_bytes(parts["weight"], expected["weight"])


def every_scale(mode, code):
    """For each scale of the format its value, and the largest magnitude that a block of it has."""
    if mode == "nvfp4":
        scales = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        scales = np.exp2(np.arange(-149, 125, dtype=np.float64))
    with np.errstate(over="ignore"):
        largest = (scales * 6).astype(np.float32).astype(NUMPY_DTYPES[code])
    within = (largest.astype(np.float32) > 0) & np.isfinite(largest.astype(np.float32))
    return scales[within], largest[within]


@pytest.mark.parametrize("code", ["F16", "BF16"])
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_every_half_precision_value_under_every_scale(mode, code):
    """Both signs of all magnitudes up to the largest of a block, for each scale that there is."""
    spec = QuantSpec.make(mode, method="mlx")
    blocks = []
    for top in every_scale(mode, code)[1].view(np.uint16):
        within = np.arange(top + 1, dtype=np.uint16)
        within[::2] |= 0x8000
        block = np.full((-(-len(within) // 15), 16), top, np.uint16)
        block[:, 1:].flat[: len(within)] = within
        blocks.append(np.pad(block, ((0, 0), (0, spec.group_size - 16))))
    w = np.concatenate(blocks).view(NUMPY_DTYPES[code])
    w = np.concatenate([w, w[::-1]], axis=1) if w.shape[1] % 32 else w
    parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
    assert same_bytes(parts["scales"], expected["scales"])
    assert same_bytes(parts["weight"], expected["weight"])


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_float32_values_beside_every_edge_under_every_scale(mode):
    spec = QuantSpec.make(mode, method="mlx")
    scales, largest = every_scale(mode, "F32")
    edges = scales[:, None] * np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    bits = edges.astype(np.float32).view(np.int32)
    w = np.zeros((len(scales), 32), np.float32)
    w[:, 0] = w[:, 16] = largest
    for i, step in enumerate((-1, 0, 1, 2)):
        part = (bits + step).clip(0).astype(np.int32).view(np.float32)
        w[:, 1 + 16 * (i // 2) + 7 * (i % 2) :][:, :7] = part * np.float32((-1) ** i)
    parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
    assert same_bytes(parts["scales"], expected["scales"])
    assert same_bytes(parts["weight"], expected["weight"])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("code", FLOATS)
def test_every_code_under_every_scale_dequantizes_like_mlx(mode, code):
    spec = QuantSpec.make(mode)
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1)).view(np.uint32)
    groups = codes.shape[1] * 32 // spec.bits // spec.group_size
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], groups, axis=1)
    parts = {"weight": codes, "scales": scales}
    expected = stock_dequantize(parts, spec, code)
    assert same_values(dequantize_rows(parts, spec, code), expected)


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rtn_keeps_scales_and_is_never_worse_than_mlx(code, bits):
    rng = np.random.default_rng(bits)
    w = (rng.standard_normal((64, 512)) * 0.02).astype(NUMPY_DTYPES[code])
    w32 = w.astype(np.float32)
    rtn, mlx = (QuantSpec.make("affine", bits, 64, method) for method in ("rtn", "mlx"))
    a, b = quantize_rows(w, rtn), quantize_rows(w, mlx)
    assert same_bytes(a["scales"], b["scales"])
    assert same_bytes(a["biases"], b["biases"])

    def mse(parts):
        codes = dequantize_rows(
            {
                "weight": parts["weight"],
                "scales": parts["scales"].astype(np.float32),
                "biases": parts["biases"].astype(np.float32),
            },
            rtn,
            "F32",
        )
        return float(((codes.astype(np.float64) - w32) ** 2).mean())

    assert mse(a) <= mse(b)
    if code == "BF16" and bits == 8:
        assert mse(a) < 0.75 * mse(b)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_microscaled_methods_coincide_in_range_and_rtn_saturates_outside(mode):
    rng = np.random.default_rng(3)
    rtn, mlx = (QuantSpec.make(mode, method=method) for method in ("rtn", "mlx"))
    w = (rng.standard_normal((16, 128)) * 0.02).astype(ml_dtypes.bfloat16)
    assert {k: v.tobytes() for k, v in quantize_rows(w, rtn).items()} == {
        k: v.tobytes() for k, v in quantize_rows(w, mlx).items()
    }
    if mode == "nvfp4":
        far = np.full((1, 32), 1e12, np.float32)
        assert (dequantize_rows(quantize_rows(far, rtn), rtn, "F32") == 448 * 6).all()
    else:
        faint = np.full((1, 32), 2.0**-133, np.float32)
        parts = quantize_rows(faint, rtn)
        assert parts["scales"].tolist() == [[0]]
        assert np.abs(dequantize_rows(parts, rtn, "F32") - faint).max() <= 2.0**-129


def test_nvfp4_rows_of_an_odd_number_of_groups():
    spec = QuantSpec.make("nvfp4", method="mlx")
    w = np.random.default_rng(0).standard_normal((6, 48)).astype(np.float32)
    expected = stock_quantize(w, spec)
    for rows in (slice(0, 6), slice(2, 5)):
        parts = quantize_rows(w[rows], spec)
        for suffix, part in parts.items():
            assert same_bytes(part, np.ascontiguousarray(expected[suffix][rows]))
        values = dequantize_rows(parts, spec, "F32")
        assert same_values(values, stock_dequantize(expected, spec, "F32")[rows])


@pytest.mark.parametrize(("mode", "bits", "group_size"), [*SETTINGS[::4], *SETTINGS[-3:]])
def test_expert_stacks_quantize_along_the_last_axis(mode, bits, group_size):
    spec = QuantSpec.make(mode, bits, group_size, "mlx")
    w = np.random.default_rng(0).standard_normal((3, 4, 128)).astype(np.float16)
    parts, expected = quantize_rows(w, spec), stock_quantize(w, spec)
    for suffix, part in parts.items():
        assert same_bytes(part, expected[suffix])
    assert dequantize_rows(parts, spec, "F16").shape == w.shape


def test_row_blocks_and_given_outputs_make_the_same_bytes():
    spec = QuantSpec.make("affine", 5, 32)
    w = np.random.default_rng(0).standard_normal((700, 384)).astype(ml_dtypes.bfloat16)
    whole = quantize_rows(w, spec)
    out = {
        suffix: np.empty(shape, NUMPY_DTYPES[code])
        for suffix, (code, shape) in spec.output_tensors(w.shape, CODES[w.dtype]).items()
    }
    for start in range(0, 700, 300):
        block = slice(start, min(start + 300, 700))
        quantize_rows(w[block], spec, out={suffix: part[block] for suffix, part in out.items()})
    assert {k: v.tobytes() for k, v in whole.items()} == {k: v.tobytes() for k, v in out.items()}


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_read_only_arrays_are_read_and_never_written(method):
    w = np.linspace(-1, 1, 256, dtype=np.float32).reshape(2, 128)
    w.flags.writeable = False
    spec = QuantSpec.make("affine", 4, 64, method)
    parts = quantize_rows(w, spec)
    before = {role: part.copy() for role, part in parts.items()}
    for role in parts:
        parts[role].flags.writeable = False
        with pytest.raises(ValueError, match=f"{role}: the array is read-only"):
            quantize_rows(np.zeros_like(w), spec, out=parts)
        parts[role].flags.writeable = True
    assert all((part == before[role]).all() for role, part in parts.items())
    half, words = np.zeros(w.shape, np.float16), np.zeros((2, 16), np.uint32)
    half.flags.writeable = words.flags.writeable = False
    with pytest.raises(ValueError, match="out: the array is read-only"):
        cast(w, "F16", out=half)
    for bits in (4, 8):
        with pytest.raises(ValueError, match="out: the array is read-only"):
            pack_rows(np.zeros((2, 128 if bits == 4 else 64), np.uint8), bits, out=words)


def test_an_empty_block_has_empty_parts():
    parts = quantize_rows(np.zeros((0, 64), np.float32), QuantSpec.make("affine"))
    assert {suffix: part.shape for suffix, part in parts.items()} == {
        "weight": (0, 8),
        "scales": (0, 1),
        "biases": (0, 1),
    }


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["rtn", "mlx"])
def test_the_first_nonfinite_element_is_named(code, mode, value, method):
    w = np.ones((1100, 128), NUMPY_DTYPES[code])
    w[1050, 77] = w[1050, 99] = w[1090, 3] = value
    with pytest.raises(NonFiniteError, match="at row 1050, column 77") as error:
        quantize_rows(w, QuantSpec.make(mode, method=method))
    assert (error.value.row, error.value.column) == (1050, 77)


def test_rtn_refuses_a_group_wider_than_float32():
    w = np.zeros((2, 64), np.float32)
    w[1, :2] = 3e38, -3e38
    with pytest.raises(
        NonFiniteError, match="a group's range overflows float32 at row 1, column 0"
    ):
        quantize_rows(w, QuantSpec.make("affine"))


def test_rounding_rules_name_every_mode():
    assert ROUNDING_RULES.keys() == {"affine", "mxfp4", "mxfp8", "nvfp4"}
