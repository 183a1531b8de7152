import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.packing import pack_rows, unpack_rows

BITS = [2, 3, 4, 5, 6, 8]
LITERALS = {
    # codes, then the words that hold them, written out by hand: code k starts at bit k * bits.
    2: ([1, 2, 3] + [0] * 28 + [2], [0b11_10_01, 0b10 << 30]),
    3: ([7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 5] + [0] * 20 + [4], [0x4000000F, 1, 1 << 31]),
    4: ([1, 2, 3, 4, 5, 6, 7, 8] + [0] * 23 + [15], [0x87654321, 0, 0, 0xF0000000]),
    5: ([31, 1, 0, 0, 0, 0, 7] + [0] * 24 + [16], [0xC000003F, 1, 0, 0, 1 << 31]),
    6: ([63, 1, 0, 0, 0, 13] + [0] * 25 + [32], [0x4000007F, 3, 0, 0, 0, 1 << 31]),
    8: ([1, 2, 3, 4] + [0] * 27 + [255], [0x04030201, 0, 0, 0, 0, 0, 0, 0xFF000000]),
}


@pytest.mark.parametrize("bits", BITS)
def test_words_written_by_hand(bits):
    codes, words = LITERALS[bits]
    packed = pack_rows(np.array([codes], np.uint8), bits)
    assert packed.tolist() == [words]
    assert unpack_rows(packed, bits).tolist() == [codes]


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), blocks=st.integers(1, 9), data=st.data())
def test_unpacking_inverts_packing_and_agrees_with_one_big_integer(bits, rows, blocks, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * blocks), dtype=np.uint8)
    packed = pack_rows(codes, bits)
    assert np.array_equal(unpack_rows(packed, bits), codes)
    for row, words in zip(codes.tolist(), packed, strict=True):
        stream = sum(code << (k * bits) for k, code in enumerate(row))
        assert int.from_bytes(words.tobytes(), "little") == stream


@pytest.mark.parametrize("bits", BITS)
def test_stock_mlx_unpacks_the_same_codes(bits):
    import mlx.core as mx

    codes = (np.arange(4 * 64).reshape(4, 64) % 2**bits).astype(np.uint8)
    packed = mx.array(pack_rows(codes, bits))
    ones = mx.ones((4, 1))
    stock = mx.dequantize(packed, ones, mx.zeros((4, 1)), group_size=64, bits=bits)
    assert np.array_equal(np.array(stock), codes)
