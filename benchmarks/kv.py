"""KV-cache schemes side by side: ours, mlx-vlm's and the theory, in one run.

``python -m benchmarks.kv`` prints Markdown and writes benchmarks/kv.md and kv.json: distortion and
bias of unit vectors, encoding and decoding time at 4,096 tokens, and the loss on models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
BITS = (1, 2, 3, 4, 5, 6, 8)
SIZES = (64, 128, 256)
CONTEXT = 4096
_ROTATIONS = 32
_VECTORS = 128
_ROUNDS = 128
PARTS = ("distortion", "bias", "speed")
KINDS: dict[str, tuple[float, ...]] = {"typical": (), "one": (1.5,), "two": (1.0, -2.0)}
"""Massive channels, at other places in every vector, in units of the vector's norm."""

Row = dict[str, Any]
Codec = Callable[[int], Callable[[Any], NDArray[Any]]]
"""By seed of the rotation: vectors in, what is decoded of them out."""


def main() -> None:
    """Measure, print rows as they come, and write both files; parts left out stay as they were."""
    from benchmarks.kv_losses import MODELS, losses
    from benchmarks.machine import describe, load
    from validate.runtime import prepare_mlx

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "kv.md")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *MODELS], help="Default: all.")
    given = parser.parse_args()
    prepare_mlx()
    works: dict[str, Callable[[], Iterator[Row]]] = {
        "distortion": distortions,
        "bias": biases,
        "speed": speeds,
        **{name: partial(losses, name) for name in MODELS},
    }
    for name in given.only or works:
        before, since, rows = load(), time.monotonic(), []
        for row in works[name]():
            rows.append(row)
            print(_line(row), flush=True)
        seconds = time.monotonic() - since
        _store(
            given.out, name, rows, seconds=seconds, load=(before + load()) / 2, machine=describe()
        )


def _store(
    out: Path, name: str, rows: list[Row], *, seconds: float, load: float, machine: dict[str, str]
) -> None:
    """Put one part's rows beside what the files hold of the others."""
    file = out.with_suffix(".json")
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"parts": {}}
    data["machine"] = machine
    part = {"seconds": round(seconds), "load": round(load, 1), "rows": rows}
    data["parts"][name] = part
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    out.write_text("\n".join(_page(data)) + "\n", encoding="utf-8")


def _page(data: dict[str, Any]) -> Iterator[str]:
    from benchmarks.kv_losses import MODELS

    yield from ("# KV cache", "", "Made by `python -m benchmarks.kv`.", "")
    yield ", ".join(f"{key} {value}" for key, value in data["machine"].items()) + "."
    for title, text, names in (
        ("Squared error of unit vectors", _DISTORTION, PARTS[:1]),
        ("Mean error of inner products", _BIAS, PARTS[1:2]),
        (f"One query over {CONTEXT} tokens, and encoding them, ms", _SPEED, PARTS[2:]),
        ("KL from a float cache", _LOSS, MODELS),
    ):
        parts = [data["parts"][name] for name in names if name in data["parts"]]
        rows = [row for part in parts for row in part["rows"]]
        if not rows:
            continue
        taken = sum(part["seconds"] for part in parts)
        busy = max(part["load"] for part in parts)
        yield from ("", f"## {title}", "", text, "")
        yield from (f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]))
        yield from map(_line, rows)
        yield from ("", f"{taken} seconds, at a load of up to {busy:.1f}.")


def _line(row: Row) -> str:
    return f"| {' | '.join(_cell(value) for value in row.values())} |"


_DISTORTION = (
    f"Mean over {_ROTATIONS} rotations of {_VECTORS} vectors each: random directions, and such "
    "with one or two channels that are massive. All codecs store one 16-bit norm beside the codes; "
    "`off` is how far ours with one scale is from the theory of its codebook."
)
_BIAS = (
    f"Of unit vectors with queries at a cosine of 0.9, over {_ROUNDS} rotations of "
    f"{_VECTORS} vectors, in thousandths; beside ours its standard error. `paper` stores the "
    "vector's norm, as arXiv 2504.19874 has it."
)
_SPEED = (
    "One sequence, MLX on the CPU, best of six rounds taken in turn. `ours` keeps 64 tokens in "
    "float; mlx-vlm's is its turboquant."
)
_LOSS = (
    "In nats, mean over positions: `prefill` over the last 448 tokens of a prompt that goes "
    "through in pieces of 64, `decode` over 32 tokens decoded one by one after it. Bits count "
    "norms, scales, and whatever the setting keeps in float, at that length. `ours, codec alone` "
    "keeps neither first nor last tokens and no mean, and leaves in float the layer that mlx-vlm "
    "leaves; it and the runtime's rows of the same scheme and bits compare codecs. Twins have "
    "random weights and read random tokens."
)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def vectors(dim: int, massive: tuple[float, ...], seed: int) -> NDArray[np.float32]:
    """Unit vectors [_VECTORS, dim] with channels that stand out."""
    draw = np.random.default_rng([seed, dim])
    x = draw.standard_normal((_VECTORS, dim))
    for size in massive:
        x[np.arange(_VECTORS), draw.integers(0, dim, _VECTORS)] += size * np.sqrt(dim)
    unit: NDArray[np.float32] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit


def _ours(dim: int, bits: int, seed: int, **settings: Any) -> Callable[[Any], NDArray[Any]]:
    import mlx.core as mx

    from quant.kv.rotation import Rotation
    from quant.kv.turbo import TurboCodec

    rotation = Rotation.random(dim, seed)
    codec = TurboCodec(dim=dim, bits=bits, rotation=rotation, **settings)
    return lambda x: np.array(rotation.inverse(codec.decode(codec.encode(mx.array(x)))))


def _theirs(dim: int, bits: int, seed: int) -> Callable[[Any], NDArray[Any]]:
    import mlx.core as mx
    from mlx_vlm.turboquant import _TurboQuantMSECodec

    codec = _TurboQuantMSECodec(dim, bits, seed)
    return lambda x: np.array(codec.dequantize(codec.quantize(mx.array(x)[None, None])))[0, 0]


def _errors(make: Codec, texts: list[NDArray[np.float32]]) -> float:
    """Mean squared error, each text under a rotation of its own."""
    found = [((make(seed)(x) - x) ** 2).sum(axis=1).mean() for seed, x in enumerate(texts)]
    return float(np.mean(found))


def distortions() -> Iterator[Row]:
    """Ours with one scale and with five, mlx-vlm's, and the theory."""
    from quant.kv.codebook import distortion

    for kind, massive in KINDS.items():
        for dim in SIZES:
            texts = [vectors(dim, massive, seed) for seed in range(_ROTATIONS)]
            for bits in BITS:
                one = _errors(partial(_ours, dim, bits, norm="own"), texts)
                five = _errors(partial(_ours, dim, bits, norm="least", tries=5), texts)
                stock = _errors(partial(_theirs, dim, bits), texts)
                theory = distortion(dim, bits)
                yield {
                    "vectors": kind,
                    "channels": dim,
                    "bits": bits,
                    "theory": theory,
                    "ours, 1 scale": one,
                    "off": f"{100 * (one / theory - 1):+.2f} %",
                    "ours, 5 scales": five,
                    "mlx-vlm": stock,
                    "mlx-vlm / ours": stock / five,
                }


def biases() -> Iterator[Row]:
    """The unbiased norm, the paper's, and mlx-vlm's codec."""
    for dim in SIZES[:2]:
        pairs = []
        for seed in range(_ROUNDS):
            x = vectors(dim, (), seed)
            pairs.append((x, 0.9 * x + np.sqrt(1 - 0.81) * vectors(dim, (), seed + _ROUNDS)))
        for bits in BITS[:4]:
            makers: tuple[Codec, ...] = (
                partial(_ours, dim, bits, norm="unbiased"),
                partial(_ours, dim, bits, norm="own"),
                partial(_theirs, dim, bits),
            )
            found = [
                [
                    float(((make(seed)(x) - x) * q).sum(axis=1).mean())
                    for seed, (x, q) in enumerate(pairs)
                ]
                for make in makers
            ]
            ours, paper, stock = (1e3 * float(np.mean(one)) for one in found)
            yield {
                "channels": dim,
                "bits": bits,
                "ours": ours,
                "standard error": 1e3 * float(np.std(found[0]) / np.sqrt(_ROUNDS)),
                "paper": paper,
                "mlx-vlm": stock,
            }


def _timed(works: list[Callable[[], Any]], rounds: int = 6) -> list[float]:
    """Milliseconds of the fastest round of each; they take turns."""
    import mlx.core as mx

    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, times in zip(works, found, strict=True):
            since = time.perf_counter()
            mx.eval(work())
            times.append(time.perf_counter() - since)
    return [1e3 * min(times[1:]) for times in found]


def speeds() -> Iterator[Row]:
    """Attention of one token over a full cache, and encoding a whole one."""
    for heads, kv_heads, dim in ((32, 8, 128), (14, 2, 64), (8, 4, 256)):
        for bits, key, value in ((3.5, 3, 4), (4, 4, 4), (8, 8, 8)):
            yield _speed(heads, kv_heads, dim, bits, key, value)


def _speed(heads: int, kv_heads: int, dim: int, bits: float, key: int, value: int) -> Row:
    import mlx.core as mx
    from mlx_vlm.models.base import scaled_dot_product_attention
    from mlx_vlm.turboquant import TurboQuantKVCache

    from quant.kv.cache import QuantizedStateCache
    from quant.kv.rotation import Rotation
    from quant.kv.spec import LayerSpec, TensorSpec

    keys, values = (mx.random.normal((1, kv_heads, CONTEXT, dim)) for _ in "kv")
    query, scale = mx.random.normal((1, heads, 1, dim)), dim**-0.5
    mx.eval(keys, values, query)
    layer = LayerSpec(
        key=TensorSpec(scheme="turboquant", bits=key),
        value=TensorSpec(scheme="turboquant", bits=value),
    )
    rotations = {dim: Rotation.random(dim, 1)}

    def filled() -> QuantizedStateCache:
        cache = QuantizedStateCache(layer, rotations)
        cache.update_and_fetch(keys, values)
        cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])  # encodes those before
        return cache

    def packed(cache: QuantizedStateCache) -> Any:
        return [store.kept() for store in cache.stores or ()]

    def stock() -> Any:
        cache = TurboQuantKVCache(bits=bits)
        return cache, cache.update_and_fetch(keys, values)

    encode = _timed([lambda: packed(filled()), lambda: stock()[0].state], 3)
    mine, (other, state) = filled(), stock()
    mx.eval(packed(mine), other.state)
    decode = _timed(
        [
            lambda: mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale),
            lambda: mine.attend(query, scale=scale),
            lambda: scaled_dot_product_attention(query, *state, other, scale, None),
        ]
    )
    return {
        "heads": f"{heads}/{kv_heads}",
        "channels": dim,
        "keys/values": f"{key}/{value}",
        "float": decode[0],
        "ours": decode[1],
        "mlx-vlm": decode[2],
        "ratio": f"{decode[2] / decode[1]:.1f}x",
        "encode, ours": encode[0],
        "encode, mlx-vlm": encode[1],
        "encode ratio": f"{encode[1] / encode[0]:.1f}x",
    }


if __name__ == "__main__":
    main()
