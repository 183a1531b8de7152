"""GGML's block types, decoded and repacked, against llama.cpp's own Python package."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from quant.decode.block import CodingError
from quant.decode.ggml import BY_NAME, TYPES, blocks_of
from quant.weights import dequantize_rows

ROWS, COLUMNS = 5, 768
BLOCKS = [name for name, kind in BY_NAME.items() if kind.unpack is not None]
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
"""Where each block has its float16 numbers, which must be finite."""


def stored(name, rng):
    """(rows, bytes) with every bit pattern that the type allows."""
    kind = BY_NAME[name]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // kind.block, kind.nbytes), dtype=np.uint8)
    for at in HALVES[name]:
        numbers = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = numbers[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(100, 150, blocks.shape[:2])
    return blocks.reshape(ROWS, -1)


def test_the_table_of_types_is_ggmls():
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[theirs]
        assert (kind.name, kind.block, kind.nbytes) == (theirs.name, block, size)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_bit_pattern_decodes_as_llama_cpp_does(name):
    raw = stored(name, np.random.default_rng(7))
    expected = dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(blocks_of(BY_NAME[name], raw).values("F32"), expected)


@pytest.mark.parametrize("name", [n for n in BLOCKS if BY_NAME[n].native is not None])
def test_codes_kept_mean_the_same(name):
    import mlx.core as mx

    raw = stored(name, np.random.default_rng(8))
    spec, _ = BY_NAME[name].native
    block = blocks_of(BY_NAME[name], raw)
    roles = ("weight", "scales", "biases") if spec.mode == "affine" else ("weight", "scales")
    parts = {role: block.repacked(spec, "F32", role) for role in roles}
    values = mx.dequantize(
        *(mx.array(parts[role]) for role in roles),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )
    expected = dequantize(raw, gguf.GGMLQuantizationType[name])
    # product and sum are rounded one after the other
    np.testing.assert_allclose(np.array(values), expected, rtol=0, atol=abs(expected).max() * 2e-6)
    np.testing.assert_array_equal(dequantize_rows(parts, spec, "F32"), np.array(values))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_half_precision_holds_scales_and_biases(name):
    weight = np.random.default_rng(9).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    raw = quantize(weight, gguf.GGMLQuantizationType[name])
    block = blocks_of(BY_NAME[name], raw)
    spec, _ = BY_NAME[name].native
    for role in ("scales", "biases"):
        half = block.repacked(spec, "F16", role)
        np.testing.assert_array_equal(half.astype(np.float32), block.repacked(spec, "F32", role))


def test_a_block_that_is_no_number_is_refused():
    raw = stored("Q4_K", np.random.default_rng(10))
    raw[3, 2:4] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(CodingError, match="the minimum of row 3, group 0 is NaN or infinite"):
        blocks_of(BY_NAME["Q4_K"], raw).values("F32")
