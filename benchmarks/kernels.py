"""GB of bf16 weights quantized in a second of a core, by mode, width and method.

Run as a process of its own: ``python -m benchmarks.kernels`` prints JSON. Seconds are of processor
time and the best of some runs, so that what else the machine does counts little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

COLUMNS: Final = 2048
_ROUNDS: Final = 5
_ROWS: Final = {"mlx": 2048, "rtn": 2048, "search": 256, "imatrix": 512}
_STOCK_ROWS: Final = {"affine": 512, "mxfp8": 512, "mxfp4": 128, "nvfp4": 128}


def measured() -> Iterator[dict[str, Any]]:
    """One dict of rates for each mode and width: of ``stock``, mx.quantize, and each method."""
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

            out = quantize_rows(part, spec, moments=moments)

            def quantize(
                part: Any = part, spec: QuantSpec = spec, moments: Any = moments, out: Any = out
            ) -> object:
                return quantize_rows(part, spec, moments=moments, out=out)

            found[method] = _rate(quantize, part.nbytes)
        yield found


def _rate(work: Callable[[], object], size: int) -> float:
    """GB/s of ``work`` on ``size`` bytes, by the processor time of all its threads."""
    work()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return size / min(seconds) / 1e9


def _stock(weights: Any, mode: str, bits: int) -> float:
    """mx.quantize on the CPU."""
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
    print(json.dumps(list(measured())))
