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

HERE = Path(__file__).parent
CONTEXT = 4096
_ASIDE = 2
PARTS = ("distortion", "bias", "speed")
Row = dict[str, Any]


def main() -> None:
    """Measure, print rows as they come, and write both files; parts left out stay as they were."""
    from benchmarks.kv_codecs import biases, distortions
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
        before, since, worked, rows = load(), time.monotonic(), time.process_time(), []
        for row in works[name]():
            rows.append(row)
            print(_line(row), flush=True)
        part = {
            "seconds": round(time.monotonic() - since),
            "cpu_seconds": round(time.process_time() - worked),
            "load": round((before + load()) / 2, 1),
            "rows": rows,
        }
        _store(given.out, name, part, describe())


def _store(out: Path, name: str, part: dict[str, Any], machine: dict[str, str]) -> None:
    """Put one part's rows beside what the files hold of the others."""
    file = out.with_suffix(".json")
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"parts": {}}
    data["machine"] = machine
    data["parts"][name] = part
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    out.write_text("\n".join(_page(data)) + "\n", encoding="utf-8")


def _page(data: dict[str, Any]) -> Iterator[str]:
    from benchmarks.kv_codecs import BIAS, DISTORTION
    from benchmarks.kv_losses import MODELS

    yield from ("# KV cache", "", "Made by `python -m benchmarks.kv`.", "")
    yield ", ".join(f"{key} {value}" for key, value in data["machine"].items()) + "."
    for title, text, names, key in (
        ("Squared error of unit vectors", DISTORTION, PARTS[:1], "vectors"),
        ("Mean error of inner products", BIAS, PARTS[1:2], "channels"),
        (f"One query over {CONTEXT} tokens, and encoding them, ms", _SPEED, PARTS[2:], "heads"),
        ("KL from a float cache: auto at 3.5 bits against uniform 4", _AGAINST, MODELS, "text"),
        ("KL from a float cache", _LOSS, MODELS, "setting"),
    ):
        parts = [data["parts"][name] for name in names if name in data["parts"]]
        rows = [row for part in parts for row in part["rows"] if key in row]
        if not rows:
            continue
        taken = sum(part["seconds"] for part in parts)
        worked = sum(part["cpu_seconds"] for part in parts)
        busy = max(part["load"] for part in parts)
        yield from ("", f"## {title}", "", text, "")
        yield from (f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]))
        yield from map(_line, rows)
        yield from ("", f"{taken} seconds, {worked} of a processor, at a load of up to {busy:.1f}.")


def _line(row: Row) -> str:
    return f"| {' | '.join(_cell(value) for value in row.values())} |"


_SPEED = (
    "One sequence, MLX on the CPU, time of a processor, best of six rounds taken in turn; encoding "
    "once. `ours` keeps "
    f"64 tokens in float; `aside` is the same with {_ASIDE} channels of every head's keys and "
    "values kept aside, at the same bytes, as a study of massive channels would have it; `learned` "
    "are bases of directions of which the first have twenty times the squares of the last; "
    "mlx-vlm's is its turboquant. Ratios are mlx-vlm's time over ours."
)
_AGAINST = (
    "Over as many positions as below. `auto` has 3.5 bits on average, norms counted, beside the "
    "first four and the last 64 to 128 tokens in float; the runtime's uniform caches have 4.5, or "
    "5 with heads of 32 channels. "
    "Learned and chosen on the text before what is measured, which attends to it: on other texts "
    "`auto` gains less. Differences are of the same "
    "positions, with their standard error; below zero `auto` loses less. Of Gemma 4, whose sliding "
    "windows the runtime refuses to quantize, uniform is the same codec in its other layers."
)
_LOSS = (
    "In nats, mean over positions: `prefill` over the last 384 tokens (248 of twins) of a prompt "
    "that goes through in pieces of 64, `decode` over 128 decoded one by one after it. Bits count "
    "norms, scales, channels aside, and whatever the setting keeps in float, at that length. "
    "`ours, codec alone` keeps neither first nor last tokens and no mean, and leaves in float the "
    "layer that mlx-vlm leaves; it and the runtime's rows of the same scheme and bits compare "
    "codecs. Twins have random weights and read random tokens; those of Qwen2 have heads of 32 "
    "channels, of which a norm takes twice the share that it takes in the smallest releases."
)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _timed(works: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of a processor in the cheapest round of each; they take turns.

    Not of the clock, which counts what else the machine does.
    """
    import mlx.core as mx

    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, found, strict=True):
            since = time.process_time()
            mx.eval(work())
            times.append(time.process_time() - since)
    return [1e3 * min(times) for times in found]


def speeds() -> Iterator[Row]:
    """Attention of one token over a full cache, and encoding a whole one."""
    for heads, kv_heads, dim in ((32, 8, 128), (14, 2, 64), (8, 4, 256)):
        for bits, key, value in ((3.5, 3, 4), (4, 4, 4), (8, 8, 8)):
            yield _speed(heads, kv_heads, dim, bits, key, value)


def _speed(heads: int, kv_heads: int, dim: int, bits: float, key_bits: int, value_bits: int) -> Row:
    import mlx.core as mx
    import numpy as np
    from mlx_vlm.models.base import scaled_dot_product_attention
    from mlx_vlm.turboquant import TurboQuantKVCache

    from quant.kv.cache import QuantizedStateCache
    from quant.kv.learned import learn
    from quant.kv.rotation import Rotation
    from quant.kv.spec import LayerSpec
    from quant.kv.split import Layout

    keys, values = (mx.random.normal((1, kv_heads, CONTEXT, dim)) for _ in "kv")
    query, scale = mx.random.normal((1, heads, 1, dim)), dim**-0.5
    mx.eval(keys, values, query)
    rotations = {dim: Rotation.random(dim, 1)}

    turns = np.linalg.qr(np.random.default_rng(dim).standard_normal((kv_heads, dim, dim)))[0]
    basis, squares = learn((turns * np.geomspace(1.0, 0.05, dim)) @ turns.swapaxes(-1, -2))
    plain = Layout(dim=dim, top=100.0)
    kept_aside = Layout(dim=dim, aside=(tuple(range(_ASIDE)),) * kv_heads, top=100.0)
    learned = Layout(dim=dim, top=100.0, basis=basis, squares=squares)

    def filled(one: Layout, count: int = CONTEXT) -> QuantizedStateCache:
        key, value = (one.tensor(one.widest(bits * dim + 16)) for bits in (key_bits, value_bits))
        cache = QuantizedStateCache(LayerSpec(key=key, value=value), rotations)
        cache.update_and_fetch(keys[:, :, :count], values[:, :, :count])
        cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])  # encodes those before
        mx.eval([store.kept() for store in cache.stores or ()])
        return cache

    def stock(count: int = CONTEXT) -> Any:
        cache = TurboQuantKVCache(bits=bits)
        state = cache.update_and_fetch(keys[:, :, :count], values[:, :, :count])
        mx.eval(cache.state)
        return cache, state

    kept: list[Any] = []
    makes: list[Callable[..., Any]] = [
        *(partial(filled, one) for one in (plain, kept_aside, learned)),
        stock,
    ]
    for make in makes:
        make(count=128)
    encode = [
        _timed([lambda make=make: kept.append(make())], 1)[0]  # type: ignore[misc]
        for make in makes
    ]
    *ours, (other, (packed_keys, packed_values)) = kept
    decode = _timed(
        [
            lambda: mx.fast.scaled_dot_product_attention(query, keys, values, scale=scale),
            *(partial(cache.attend, query, scale=scale) for cache in ours),
            lambda: scaled_dot_product_attention(
                query, packed_keys, packed_values, other, scale, None
            ),
        ],
        6,
    )
    return {
        "heads": f"{heads}/{kv_heads}",
        "channels": dim,
        "keys/values": f"{key_bits}/{value_bits}",
        "float": decode[0],
        "ours": decode[1],
        "aside": decode[2],
        "learned": decode[3],
        "mlx-vlm": decode[4],
        "ratio": f"{decode[4] / decode[1]:.1f}x",
        "ratio, aside": f"{decode[4] / decode[2]:.1f}x",
        "ratio, learned": f"{decode[4] / decode[3]:.1f}x",
        "encode, ours": encode[0],
        "encode, aside": encode[1],
        "encode, learned": encode[2],
        "encode, mlx-vlm": encode[3],
        "encode ratio": f"{encode[3] / encode[0]:.1f}x",
    }


if __name__ == "__main__":
    main()
