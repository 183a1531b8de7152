"""KV-cache schemes side by side: ours, mlx-vlm's and the theory, in one run.

``python -m benchmarks.kv`` prints Markdown and writes benchmarks/kv.md: distortion of unit vectors,
decode and encoding time at 4,096 tokens, and the loss on a trained model and on twins.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BITS = (1, 2, 3, 4, 5, 6, 8)
CONTEXT = 4096
TWINS = ("minicpmv4_6", "qwen3", "gemma4", "qwen2")


def main() -> None:
    from validate.runtime import prepare_mlx

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "kv.md")
    given = parser.parse_args()
    prepare_mlx()
    from benchmarks.machine import describe

    lines = [
        "# KV cache",
        "",
        "Made by `python -m benchmarks.kv`.",
        "",
        ", ".join(f"{name} {value}" for name, value in describe().items()) + ".",
        "",
    ]
    for part in (distortions, speeds, losses):
        lines += part()
        print("\n".join(lines[-12:]), flush=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def distortions() -> list[str]:
    """Squared error of unit vectors; all store one 16-bit norm beside the codes."""
    import mlx.core as mx
    from mlx_vlm.turboquant import _TurboQuantMSECodec

    from quant.kv.codebook import distortion
    from quant.kv.rotation import Rotation
    from quant.kv.turbo import TurboCodec

    lines = ["## Squared error of 4,096 random unit vectors", ""]
    lines += ["| channels | bits | theory | ours, 1 scale | ours, 5 scales | mlx-vlm |"]
    lines += ["|---|---|---|---|---|---|"]
    draw = np.random.default_rng(0)
    for dim in (64, 128, 256):
        x = draw.standard_normal((4096, dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        for bits in BITS:
            cells = []
            for tries, norm in ((1, "own"), (5, "least")):
                rotation = Rotation.random(dim, 1)
                codec = TurboCodec(
                    dim=dim,
                    bits=bits,
                    rotation=rotation,
                    norm="own" if norm == "own" else "least",
                    tries=tries,
                )
                y = np.array(rotation.inverse(codec.decode(codec.encode(mx.array(x)))))
                cells.append(float(((y - x) ** 2).sum(axis=1).mean()))
            stock = _TurboQuantMSECodec(dim, bits, 0)
            z = np.array(stock.dequantize(stock.quantize(mx.array(x)[None, None])))[0, 0]
            theirs = float(((z - x) ** 2).sum(axis=1).mean())
            row = (distortion(dim, bits), *cells, theirs)
            lines.append(f"| {dim} | {bits} | " + " | ".join(f"{v:.4g}" for v in row) + " |")
    return [*lines, ""]


def best_of(work: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds of the fastest round."""
    import mlx.core as mx

    mx.eval(work())
    found = []
    for _ in range(rounds):
        since = time.perf_counter()
        mx.eval(work())
        found.append(time.perf_counter() - since)
    return min(found) * 1e3


def speeds() -> list[str]:
    """One query token over a full cache, and encoding a whole one; rounds of both alternate."""
    import mlx.core as mx
    from mlx_vlm.models.base import scaled_dot_product_attention
    from mlx_vlm.turboquant import TurboQuantKVCache

    from quant.kv.cache import QuantizedStateCache
    from quant.kv.rotation import Rotation
    from quant.kv.spec import LayerSpec, TensorSpec

    lines = [f"## Attention of one token over {CONTEXT} tokens, CPU, ms", ""]
    lines += [
        "| heads | channels | keys / values | float | ours | mlx-vlm | ratio | encode: ours |"
    ]
    lines[-1] += " mlx-vlm |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for heads, kv_heads, dim in ((32, 8, 128), (14, 2, 64), (8, 4, 256)):
        keys, values = (mx.random.normal((1, kv_heads, CONTEXT, dim)) for _ in "kv")
        query = mx.random.normal((1, heads, 1, dim))
        for bits, key, value in ((3.5, 3, 4), (4, 4, 4), (8, 8, 8)):
            stock = TurboQuantKVCache(bits=bits)
            since = time.perf_counter()
            state = stock.update_and_fetch(keys, values)
            mx.eval(stock.state)
            theirs_encode = (time.perf_counter() - since) * 1e3
            layer = LayerSpec(
                key=TensorSpec(scheme="turboquant", bits=key),
                value=TensorSpec(scheme="turboquant", bits=value),
                window=64,
            )
            cache = QuantizedStateCache(layer, {dim: Rotation.random(dim, 1)})
            cache.update_and_fetch(keys, values)
            since = time.perf_counter()
            cache.update_and_fetch(keys[:, :, :1], values[:, :, :1])
            assert cache.stores is not None
            mx.eval([store.kept() for store in cache.stores])
            ours_encode = (time.perf_counter() - since) * 1e3
            scale = dim**-0.5

            def stocks(q: Any = query, s: Any = state, c: Any = stock, scale: float = scale) -> Any:
                return scaled_dot_product_attention(q, s[0], s[1], c, scale, None)

            def own(q: Any = query, c: Any = cache, scale: float = scale) -> Any:
                return c.attend(q, scale=scale)

            def full(q: Any = query, k: Any = keys, v: Any = values, scale: float = scale) -> Any:
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

            times = [min(best_of(work), best_of(work)) for work in (full, own, stocks)]
            cells = [*(f"{t:.1f}" for t in times), f"{times[2] / times[1]:.1f}x"]
            cells += [f"{ours_encode:.0f}", f"{theirs_encode:.0f}"]
            name = f"{heads}/{kv_heads} | {dim} | {key} / {value}"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def losses() -> list[str]:
    """The study of a trained model in both runtimes, and of twins in mlx-vlm's."""
    from converter.pipeline import Request, convert
    from converter.ui import Console
    from validate.twin import load_example, make_twin

    lines = ["## KL from a float cache, mean nats over the last 512 tokens of the text", ""]
    lines += [
        "| model | tokens | setting | bits, all counted | KL mean | p99 | same first choice |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sources = {"tinylm (trained)": ROOT / "tests" / "fixtures" / "tinylm"}
        for model_type in TWINS:
            make_twin(load_example(model_type), place / model_type)
            sources[f"{model_type} twin"] = place / model_type
        for label, source in sources.items():
            out = place / f"{source.name}-mlx"
            convert(Request(hf_path=str(source), mlx_path=out), Console(quiet=True))
            lines += _studied(label, out)
    return [*lines, ""]


def _studied(label: str, out: Path) -> list[str]:
    from converter.errors import ConvertError
    from converter.kv import study_output
    from converter.ui import Console

    lines = []
    rows: list[dict[str, Any]] = []
    tokens = 0
    for scheme, bits in (("auto", 3.5), ("turboquant", 4.0), ("uniform", 4.0)):
        try:
            report = study_output(
                out,
                scheme=scheme,
                bits=bits,
                group=32 if scheme == "uniform" else None,
                text=None,
                console=Console(quiet=True),
            )
        except ConvertError as error:
            lines.append(f"| {label} | | ours, {scheme} {bits:g} | {str(error)[-160:]} | | | |")
            continue
        rows.append({**report["chosen"], "flags": f"ours: {scheme} {bits:g}"})
        tokens = int(report["chosen"]["long"]["all"]["tokens"])
        if scheme == "auto":
            rows += report["stock"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {label} | | `{row['flags']}` | {row['error'][:120]} | | | |")
            continue
        figures = row["long"]["all"]
        lines.append(
            f"| {label} | {tokens} | {row['flags']} | {row['effective_bits']:.3f} | "
            f"{figures['kl_mean']:.3g} | {figures['kl_p99']:.3g} | {figures['top1']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
