import ml_dtypes
import numpy as np
import pytest

from arch_maps.dtypes import NUMPY_DTYPES
from quant.errors import CastOverflowError, NonFiniteError
from quant.floats import cast, check_finite

HALVES = ["F16", "BF16"]


def torch_of(array):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def torch_cast(array, code):
    import torch

    names = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    out = torch_of(array).to(names[code])
    width = out.element_size()
    bits = out.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    return bits.numpy().view(NUMPY_DTYPES[code])


def every(code):
    values = np.arange(0x10000, dtype=np.uint16)
    infinity = {"F16": 0x7C00, "BF16": 0x7F80}[code]
    return values[(values & 0x7FFF) <= infinity].view(NUMPY_DTYPES[code])


def hard_float32():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(0x10000, dtype=np.uint32)
    near = [halves << 16 | low for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF)]  # ties of bfloat16
    with np.errstate(invalid="ignore"):
        f16 = every("F16").astype(np.float32).view(np.uint32)
    ties = [f16 + low for low in (0xFFF, 0x1000, 0x1001)]  # ties of float16
    values = np.concatenate([bits, *near, *ties]).astype(np.uint32).view(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_every_half_casts_like_torch(source, target):
    values = every(source)
    expected = torch_cast(values, target)
    keep = np.isfinite(expected) | ~np.isfinite(values)
    assert cast(values[keep], target).tobytes() == expected[keep].tobytes()


@pytest.mark.parametrize("source", ["F32", "F64"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16", "F8_E5M2"])
def test_wide_floats_cast_like_torch(source, target):
    values = hard_float32().astype(NUMPY_DTYPES[source])
    if source == "F64":
        values = values * (1 + 1e-9)
    with np.errstate(over="ignore"):
        expected = torch_cast(values, target)
    keep = np.isfinite(expected)
    assert cast(values[keep], target).tobytes() == expected[keep].tobytes()


@pytest.mark.parametrize("target", HALVES)
def test_float32_casts_like_mlx(target):
    import mlx.core as mx

    values = hard_float32()
    dtype = {"F16": mx.float16, "BF16": mx.bfloat16}[target]
    expected = np.array(mx.array(values).astype(dtype).view(mx.uint16)).view(NUMPY_DTYPES[target])
    keep = np.isfinite(expected)
    assert cast(values[keep], target).tobytes() == expected[keep].tobytes()


@pytest.mark.parametrize("source", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_eight_bit_floats_widen_exactly(source, target):
    values = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[source])
    values = values[np.isfinite(values)]
    wide = cast(values, target)
    assert np.array_equal(wide.astype(np.float64), values.astype(np.float64))
    assert cast(wide, source).tobytes() == values.tobytes()


def test_the_same_type_is_not_copied():
    values = np.ones(3, np.float32)
    assert cast(values, "F32") is values


def test_a_given_output_is_filled():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for code in ("F16", "F32", "F8_E5M2"):
        out = np.zeros((2, 3), NUMPY_DTYPES[code])
        assert cast(values, code, out=out) is out
        assert out.astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_strided_arrays_are_cast_and_checked():
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert cast(values, "F16").tolist() == values.tolist()
    values = values.copy(order="F")
    values[2, 1] = np.inf
    with pytest.raises(NonFiniteError, match="at row 2, column 1"):
        check_finite(values)


def test_nan_and_infinity_stay():
    values = np.array([np.nan, np.inf, -np.inf], np.float32)
    for code in ("F64", "F16", "BF16"):
        out = cast(values, code).astype(np.float32)
        assert np.isnan(out[0])
        assert out[1:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [
        (65520.0, "F32", "F16"),
        (-65536.0, "BF16", "F16"),
        (3.4e38, "F32", "BF16"),
        (1e39, "F64", "F32"),
        (1e39, "F64", "BF16"),
        (500.0, "F32", "F8_E4M3"),
        (70000.0, "F64", "F8_E5M2"),
    ],
)
def test_overflow_is_an_error_that_names_the_element(value, source, target):
    values = np.ones((3, 5000), NUMPY_DTYPES[source])
    values[0, 0] = np.inf if target != "F8_E4M3" else 1
    values[2, 4567] = value
    with pytest.raises(CastOverflowError, match=f"range of {target} at row 2, column 4567") as e:
        cast(values, target)
    assert (e.value.row, e.value.column) == (2, 4567)


def test_the_largest_values_that_round_down_fit():
    assert cast(np.array([65519.996], np.float32), "F16").tolist() == [65504.0]


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_check_finite_names_the_first(code):
    values = np.zeros((2, 3, 5000), NUMPY_DTYPES[code])
    check_finite(values)
    values[1, 1, 4321] = np.nan
    with pytest.raises(NonFiniteError, match="at row 4, column 4321"):
        check_finite(values)


def test_check_finite_passes_integers_and_empty_arrays():
    check_finite(np.arange(5))
    check_finite(np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_check_finite_sees_infinity(code, value):
    values = np.zeros((), NUMPY_DTYPES[code])
    values[()] = value
    with pytest.raises(NonFiniteError, match="at row 0, column 0"):
        check_finite(values)
