"""Squared error and bias of unit vectors: ours, mlx-vlm's, and the theory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Array = NDArray[np.float32]
Apply = Callable[[Array], Array]
"""Vectors [heads, count, dim], each head under a rotation of its own: what is decoded of them."""

BITS = (1, 2, 3, 4, 5, 6, 8)
SIZES = (64, 128, 256)
HEADS = 512
VECTORS = 16
_SHOWN = 64
"""Vectors of each head, other than those that are judged, that the layout is chosen by."""
KINDS: dict[str, tuple[float, ...]] = {
    "typical": (),
    "one": (1.5,),
    "two": (1.0, -2.0),
    "one, moving": (1.5,),
}
"""Massive channels in units of the vector's norm: those of the head, or others in every vector."""
PAIRS = 64
ROTATIONS = 4096
_AT_ONCE = 512
_FEW = 128

DISTORTION = (
    f"Mean over {HEADS} heads, each with a rotation and {VECTORS} vectors of its own: random "
    "directions, and such with one or two channels that are massive, the same in all vectors of a "
    "head, as in models. `1 scale` is the codec of the paper, which the theory is of, with a norm "
    "of 16 bits; `off` is how far it is from it. `ours` is what the study chooses by "
    f"{_SHOWN} other vectors of each head, at the bytes of that many bits a channel and a norm of "
    "16, channels aside and norms counted, with norms that make the squared error least, as "
    "mlx-vlm's do; mlx-vlm's takes as many bytes. Beside the ratio its standard "
    "error. Of `moving` the massive channel is another in every vector, which no channels kept "
    "aside can serve, but one round of the transform can."
)
BIAS = (
    f"Of {PAIRS} unit vectors with a query each, at a cosine of 0.9, over {ROTATIONS} rotations, "
    "in thousandths, with the unbiased scale; z is the mean over its standard error. `along` is "
    "the part along the vector itself, which the scale makes right but for the rounding of norms. "
    "`pairs` is whether each pair's own mean is zero: the probability of a chi-square as large or "
    "larger over the pairs; the last row is that over the z of all cells. `paper` stores the "
    f"vector's norm, as arXiv 2504.19874 has it; it and mlx-vlm's are over {_FEW} rotations."
)


def vectors(
    draw: np.random.Generator, dim: int, massive: tuple[float, ...], places: Any, count: int
) -> Array:
    """Unit vectors [heads, count, dim] with channels that stand out at ``places`` [heads, n]."""
    heads = HEADS
    x = draw.standard_normal((heads, count, dim))
    for size, place in zip(massive, np.moveaxis(places, -1, 0), strict=False):
        at = np.broadcast_to(place.reshape(heads, -1, 1), (heads, count, 1))
        np.put_along_axis(x, at, np.take_along_axis(x, at, -1) + size * np.sqrt(dim), -1)
    unit: Array = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def _rotation(dim: int, heads: int, seed: int) -> Any:
    """As many rotations in one, along the axis of heads."""
    from quant.kv.rotation import Rotation

    each = [Rotation.random(dim, seed * heads + head).signs for head in range(heads)]
    return Rotation(dim, signs=np.stack([s for s in each if s is not None], axis=1)[:, :, None])


def _ours(rotation: Any, **settings: Any) -> Apply:
    import mlx.core as mx

    from quant.kv.codec import restored
    from quant.kv.turbo import TurboCodec

    codec = TurboCodec(rotation=rotation, **settings)
    return lambda x: np.array(restored(codec, codec.encode(mx.array(x)[None])))[0]


def _chosen(rotation: Any, shown: Array, bits: int) -> tuple[Apply, float]:
    """What the study would store, and its bits a channel."""
    from quant.kv.split import layout

    dim = shown.shape[-1]
    found = layout(shown, bits, rotation)
    tensor = found.tensor(found.widest(bits * dim + 16))
    codec = tensor.codec(dim, rotation)
    settings = {"bits": tensor.bits, "tries": tensor.tries, "top": tensor.top}
    apply = _ours(
        rotation.first(tensor.rounds), dim=dim, norm="least", aside=tensor.aside, **settings
    )
    return apply, codec.effective_bits


def _theirs(dim: int, bits: int, heads: int, seed: int) -> Apply:
    """mlx-vlm's codec; signs before and after it make its rotation another for every head."""
    import mlx.core as mx
    from mlx_vlm.turboquant import _TurboQuantMSECodec

    codec = _TurboQuantMSECodec(dim, bits, 0)
    draw = np.random.default_rng([seed, dim])
    signs = (1 - 2 * draw.integers(0, 2, (heads, 1, dim))).astype(np.float32)
    return lambda x: (
        signs * np.array(codec.dequantize(codec.quantize(mx.array(x * signs)[None])))[0]
    )


def distortions() -> Iterator[Row]:
    """The paper's codec, ours as the study chooses, mlx-vlm's, and the theory."""
    from quant.kv.codebook import distortion

    for kind, massive in KINDS.items():
        for dim in SIZES:
            draw = np.random.default_rng([len(kind), dim])
            moving = VECTORS if kind.endswith("moving") else 1
            places = np.stack(
                [draw.permuted(np.tile(np.arange(dim), (HEADS, 1)), axis=1) for _ in range(moving)],
                axis=1,
            )[..., : len(massive)]
            x = vectors(draw, dim, massive, places, VECTORS)
            if moving > 1:
                places = np.concatenate([np.roll(places, k, axis=0) for k in range(4)], axis=1)
            shown = vectors(draw, dim, massive, places, _SHOWN)
            rotation = _rotation(dim, HEADS, 0)
            for bits in BITS:
                ours, stored = _chosen(rotation, shown, bits)
                assert stored <= bits + 16 / dim
                one, mine, theirs = (
                    ((apply(x) - x) ** 2).sum(axis=-1).mean(axis=-1)
                    for apply in (
                        _ours(rotation, dim=dim, bits=bits, norm="own"),
                        ours,
                        _theirs(dim, bits, HEADS, 0),
                    )
                )
                theory, ratio = distortion(dim, bits), theirs.mean() / mine.mean()
                off = 100 * float(np.std(one) / np.sqrt(HEADS) / theory)
                spread = float(np.std(theirs - ratio * mine) / np.sqrt(HEADS) / mine.mean())
                yield {
                    "vectors": kind,
                    "channels": dim,
                    "bits": bits,
                    "theory": theory,
                    "1 scale": float(one.mean()),
                    "off": f"{100 * (one.mean() / theory - 1):+.2f} ± {off:.2f} %",
                    "ours": float(mine.mean()),
                    "mlx-vlm": float(theirs.mean()),
                    "mlx-vlm / ours": f"{ratio:.3f}",
                    "±": f"{spread:.3f}",
                }


def biases() -> Iterator[Row]:
    """The unbiased norm, the paper's, and mlx-vlm's codec; at last the test over all cells."""
    scores: list[float] = []
    for dim in SIZES[:2]:
        draw = np.random.default_rng(dim)
        x, across = (
            one / np.linalg.norm(one, axis=-1, keepdims=True)
            for one in draw.standard_normal((2, PAIRS, dim))
        )
        q = 0.9 * x + np.sqrt(1 - 0.81) * across
        for bits in BITS[:4]:
            row = _bias(dim, bits, x, q)
            scores.append(float(row["z"]))
            yield row
    yield {
        **dict.fromkeys(row, ""),
        "channels": "all",
        "z": _chance(sum(z * z for z in scores), len(scores)),
    }


def _bias(dim: int, bits: int, x: NDArray[Any], q: NDArray[Any]) -> Row:
    plain, along = [], []
    many = np.broadcast_to(x.astype(np.float32), (_AT_ONCE, *x.shape))
    for seed in range(ROTATIONS // _AT_ONCE):
        off = _ours(_rotation(dim, _AT_ONCE, seed), dim=dim, bits=bits)(many) - x
        plain.append((off * q).sum(axis=-1))
        along.append((off * x).sum(axis=-1))
    found, pure = 1e3 * np.concatenate(plain), 1e3 * np.concatenate(along)
    z = found.mean(axis=0) / (found.std(axis=0) / np.sqrt(ROTATIONS))
    few = many[:_FEW]
    others = (
        1e3 * float(((apply(few) - x) * q).sum(axis=-1).mean())
        for apply in (
            _ours(_rotation(dim, _FEW, 0), dim=dim, bits=bits, norm="own"),
            _theirs(dim, bits, _FEW, 0),
        )
    )
    mean, error = _mean(found)
    sharp, rest = _mean(pure)
    return {
        "channels": dim,
        "bits": bits,
        "ours": mean,
        "standard error": error,
        "z": f"{mean / error:+.2f}",
        "along": f"{sharp:+.5f} ± {rest:.5f}",
        "pairs": _chance(float((z * z).sum()), PAIRS),
        "paper": next(others),
        "mlx-vlm": next(others),
    }


def _mean(found: NDArray[Any]) -> tuple[float, float]:
    """Over rotations, which are independent, of the mean over pairs; and its standard error."""
    each = found.mean(axis=1)
    return float(each.mean()), float(each.std() / np.sqrt(len(each)))


def _chance(square: float, count: int) -> str:
    """That a chi-square of ``count`` degrees is as large (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * count)
    z = ((square / count) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)
    return f"chi-square {square:.1f} of {count}, p {1 - NormalDist().cdf(float(z)):.2f}"
