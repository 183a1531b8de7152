"""Learned bases: bits where they count, codes as long as sums of vectors need, files."""

from dataclasses import replace

import numpy as np
import pytest

from quant.kv.codebook import distortion
from quant.kv.codec import restored
from quant.kv.learned import Learned, learn, packed, read, shared_out
from quant.kv.rotation import Rotation
from quant.kv.split import learned_layout
from quant.kv.turbo import KvError, TurboCodec

pytestmark = pytest.mark.usefixtures("runtimes")


def spread_of(draw, heads, dim):
    """Covariances whose eigenvalues fall a thousandfold, in directions of their own."""
    turns = np.linalg.qr(draw.standard_normal((heads, dim, dim)))[0]
    return (turns * np.geomspace(1, 1e-3, dim)) @ turns.swapaxes(-1, -2)


def test_a_learned_basis_makes_all_coordinates_alike():
    import mlx.core as mx

    draw = np.random.default_rng(0)
    spread = spread_of(draw, 3, 64)
    learned, squares = learn(spread)
    assert list(squares) == sorted(squares, reverse=True)
    into, out = learned.into.astype(np.float64), learned.out.astype(np.float64)
    np.testing.assert_allclose(into @ out, np.broadcast_to(np.eye(64), (3, 64, 64)), atol=1e-4)
    alike = into.swapaxes(-1, -2) @ spread @ into
    alike /= np.diagonal(alike, axis1=-2, axis2=-1)[:, :32].mean(axis=-1)[:, None, None]
    off = alike - np.diagonal(alike, axis1=-2, axis2=-1)[..., None] * np.eye(64)
    assert np.abs(off).max() < 0.15
    # Queries' coordinates have the inner products of the vectors themselves.
    x, q = (mx.array(draw.standard_normal((2, 3, 5, 64)).astype(np.float32)) for _ in "xq")
    basis = learned.basis
    found = np.array((basis.forward(x) * basis.dual(q)).sum(axis=-1))
    np.testing.assert_allclose(found, np.array((x * q).sum(axis=-1)), atol=2e-2)
    np.testing.assert_allclose(np.array(basis.inverse(basis.forward(x))), np.array(x), atol=5e-3)


@pytest.mark.parametrize("coherence", [1.0, 4.0, 1e6])
def test_bits_are_shared_out_as_an_exhaustive_search_does(coherence):
    from itertools import product

    squares = (5.0, 1.0, 0.2, 0.01)
    errors = [distortion(32, bits) for bits in range(9)]
    lost = [error / (1 - error + error / coherence) for error in errors]
    for total in range(0, 13, 3):
        every = (widths for widths in product(range(9), repeat=4) if sum(widths) == total)
        least = min(
            sum(square * lost[bits] for square, bits in zip(squares, widths, strict=True))
            for widths in every
        )
        widths = shared_out(squares, 32, total, coherence)
        assert sum(widths) == total
        found = sum(s * lost[bits] for s, bits in zip(squares, widths, strict=True))
        assert found == pytest.approx(least)


def test_few_bits_where_vectors_hardly_lie():
    """The error is the one foretold, and a fraction of a random rotation's at the same bytes."""
    import mlx.core as mx

    draw = np.random.default_rng(1)
    spread = spread_of(draw, 2, 64)
    x = draw.standard_normal((2, 4096, 64)) @ np.linalg.cholesky(spread).swapaxes(-1, -2)
    x = x.astype(np.float32)
    one = learned_layout(x[:, :512], spread)
    tensor = one.tensor(3)
    codec = tensor.codec(64, Rotation.random(64, 1))
    assert sum(tensor.widths) * 8 == 3 * 64
    packed = codec.encode(mx.array(x[None]))
    stored = 8 * sum(part.nbytes for part in packed) / x.size
    assert stored == codec.effective_bits == one.price(3) / 64
    energy = (x.astype(np.float64) ** 2).sum()
    ours = ((np.array(restored(codec, packed))[0] - x) ** 2).sum() / energy
    plain = replace(tensor, basis=None, widths=()).codec(64, Rotation.random(64, 1))
    theirs = ((np.array(restored(plain, plain.encode(mx.array(x[None]))))[0] - x) ** 2).sum()
    assert 0.6 * one.error(3) < ours < 1.1 * one.error(3)
    assert ours < 0.35 * theirs / energy
    # Codes are short by their error, unless sums of many are what counts.
    y = np.array(restored(codec, packed))[0]
    assert (y * x).sum() / energy == pytest.approx(1 - one.error(3), abs=2e-3)
    even = replace(tensor, coherence=1e6).codec(64, Rotation.random(64, 1))
    y = np.array(restored(even, even.encode(mx.array(x[None]))))[0]
    assert (y * x).sum() / energy == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("alike", [0.0, 0.004])
def test_codes_are_as_long_as_makes_sums_of_them_right(alike):
    """Of many vectors, that much of whose variance they have in common: less error than as they
    are, and than without bias; width by width about what is foretold.
    """
    import mlx.core as mx

    draw = np.random.default_rng(3)
    count, rows = 1024, 64
    own = draw.standard_normal((rows, count, 64))
    common = draw.standard_normal((rows, 1, 64))
    x = (np.sqrt(alike) * common + np.sqrt(1 - alike) * own).astype(np.float32)
    coherence = 1 + (count - 1) * alike
    widths = (6, 4, 3, 2, 2, 1, 1, 0)
    # A mean by which nothing is coded, and coordinates that are the channels.
    rows_of = np.concatenate([np.eye(64), np.full((1, 64), 0.5)])[None].astype(np.float16)

    def left(coherence):
        codec = TurboCodec(
            dim=64,
            bits=sum(widths) / 8,
            rotation=Rotation.random(64, 1),
            learned=Learned(rows_of),
            widths=widths,
            coherence=coherence,
        )
        y = np.array(restored(codec, codec.encode(mx.array(x[:, None] + 0.5))))[:, 0] - 0.5
        error = ((y - x).sum(axis=1) ** 2).mean(axis=0).reshape(8, 8).mean(axis=-1)
        return error / count

    found = left(coherence)
    errors = np.array([distortion(64, bits) for bits in widths])
    gains = coherence / (coherence * (1 - errors) + errors)
    np.testing.assert_allclose(found[3:], (errors * gains)[3:], rtol=0.2)
    others = [left(one) for one in (1.0, 1e6) if one != coherence]
    assert all(found.sum() < 1.001 * other.sum() for other in others)
    if alike:
        assert found[3:7].sum() < 0.9 * others[0][3:7].sum()


def test_directions_are_those_in_which_errors_cost():
    """As many bits lose less of what counts than along the eigenvectors of the vectors alone."""
    import mlx.core as mx

    draw = np.random.default_rng(2)
    spread, cost = spread_of(draw, 2, 64), spread_of(draw, 2, 64)
    x = draw.standard_normal((2, 2048, 64)) @ np.linalg.cholesky(spread).swapaxes(-1, -2)
    x = x.astype(np.float32)

    def lost(one):
        codec = one.tensor(3).codec(64, Rotation.random(64, 1))
        e = np.array(restored(codec, codec.encode(mx.array(x[None]))))[0] - x
        return np.einsum("hti,hij,htj->", e, cost, e) / x.shape[1]

    one = learned_layout(x, spread, cost=cost)
    assert lost(one) < 0.3 * lost(learned_layout(x, spread))
    # As foretold: the mean over heads of the eigenvalues of spread times cost, less what bits take.
    values = np.linalg.eigvals(spread @ cost).real
    wanted = np.sort(values)[:, ::-1].mean(axis=0).reshape(8, 8).mean(axis=-1)
    np.testing.assert_allclose(one.squares[:3], wanted[:3], rtol=0.1)  # the others have a ridge
    assert lost(one) < 1.3 * one.error(3) * values.sum(axis=-1).sum()


def test_bases_are_kept_by_their_hash(tmp_path):
    bases = [learn(spread_of(np.random.default_rng(i), 2, 16))[0] for i in range(2)]
    file = tmp_path / "bases.safetensors"
    file.write_bytes(packed({one.name: one for one in bases}))
    assert file.read_bytes() == packed({one.name: one for one in reversed(bases)})
    found = read(file)
    assert sorted(found) == sorted(one.name for one in bases)
    np.testing.assert_array_equal(found[bases[0].name].rows, bases[0].rows)


def test_bases_that_are_none_are_refused_by_name(tmp_path):
    from safetensors.numpy import save

    one = learn(spread_of(np.random.default_rng(0), 2, 16))[0]
    infinite = one.rows.copy()
    infinite[0, 0, 0] = np.inf
    file = tmp_path / "bases.safetensors"
    for content, said in (
        (b"PK", "is no safetensors file"),
        (packed({one.name: one})[:-1], "is no safetensors file"),
        (save({one.name: one.rows + np.float16(1)}), "is damaged: its hash differs"),
        (save({one.name: one.rows[:, 1:]}), r"is \[2, 16, 16\], not \[heads, channels \+ 1"),
        (save({one.name: one.rows[0]}), r"is \[17, 16\], not"),
        (save({one.name: one.rows.astype(np.float32)}), "other than finite numbers of half"),
        (save({one.name: infinite}), "other than finite numbers of half"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bases\.safetensors: .*{said}"):
            read(file)
    with pytest.raises(KvError, match="a basis of 16 channels for heads of 64"):
        TurboCodec(dim=64, bits=4, rotation=Rotation.random(64, 1), learned=one, widths=(4,) * 8)


@pytest.mark.parametrize("widths", [(4, 4, 4), (2, 3, 4, 5, 6, 4, 4, 4)])
def test_widths_that_are_none_are_refused(widths):
    with pytest.raises(KvError, match="one for each 8, never ascending"):
        TurboCodec(dim=64, bits=4, rotation=Rotation.random(64, 1), widths=widths)
