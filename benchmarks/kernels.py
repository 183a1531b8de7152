"""GB of bf16 weights quantized in a second, by mode, width and method, and by mx.quantize.

Run as a process of its own: ``python -m benchmarks.kernels`` prints JSON. Best of some runs each,
so that what else the machine does counts little.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

COLUMNS: Final = 2048
_ROUNDS: Final = 3
_ROWS: Final = {"mlx": 2048, "rtn": 2048, "search": 256, "imatrix": 128}
_STOCK_ROWS: Final = {"affine": 512, "mxfp8": 512, "mxfp4": 128, "nvfp4": 128}


def measured(threads: int) -> Iterator[dict[str, Any]]:
    """One dict of rates for each mode and width: ``stock``, and the methods on ``threads``."""
    import ml_dtypes
    import numpy as np

    from quant.recipe import AFFINE_BITS, QuantSpec
    from quant.weights import quantize_rows

    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((max(_ROWS.values()), COLUMNS)) * 0.02).astype(
        ml_dtypes.bfloat16
    )
    formats = [("affine", bits) for bits in AFFINE_BITS]
    formats += [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)]
    for mode, bits in formats:
        found: dict[str, Any] = {"mode": mode, "bits": bits, "stock": _stock(weights, mode, bits)}
        for method, rows in _ROWS.items():
            spec = QuantSpec.make(mode, bits, method=method)
            moments = _moments(rng, spec.group_size) if method == "imatrix" else None
            part = weights[:rows]

            def quantize(
                part: Any = part, spec: QuantSpec = spec, moments: Any = moments
            ) -> object:
                return quantize_rows(part, spec, moments=moments)

            found[method] = _rate(quantize, part.nbytes, threads)
        yield found


def _rate(work: Callable[[], object], size: int, threads: int = 1) -> float:
    """GB/s of ``threads`` that each do the ``work`` on ``size`` bytes some times."""
    work()
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for future in [pool.submit(work) for _ in range(2 * threads)]:
                future.result()
            best = max(best, 2 * threads * size / (time.perf_counter() - start) / 1e9)
    return best


def _stock(weights: Any, mode: str, bits: int) -> float:
    """mx.quantize on the CPU, which has one thread for it."""
    import mlx.core as mx
    import numpy as np

    from quant.recipe import QuantSpec

    mx.set_default_device(mx.cpu)
    part = weights[: _STOCK_ROWS[mode]]
    w = mx.array(part.view(np.uint16)).view(mx.bfloat16)
    size = QuantSpec.make(mode, bits).group_size
    mx.eval(w)
    return _rate(
        lambda: mx.eval(mx.quantize(w, group_size=size, bits=bits, mode=mode)), part.nbytes
    )


def _moments(rng: Any, size: int) -> Any:
    """Second moments of inputs whose columns differ in scale, as activations do."""
    import numpy as np

    groups = COLUMNS // size
    inputs = rng.standard_normal((groups, 4 * size, size))
    inputs *= np.exp(rng.standard_normal((groups, 1, size)))
    return (np.einsum("gni,gnj->gij", inputs, inputs) / (4 * size)).astype(np.float32)


if __name__ == "__main__":
    print(json.dumps(list(measured(int(sys.argv[1])))))
