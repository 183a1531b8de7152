"""The calibrated quantizers of mlx-lm, run as ``python -m mlx_lm awq`` and so on run them.

What they compute is left alone, up to the order of sums; how is not, because the CPU backend would
take hours: a fast BLAS is loaded before MLX, products of bfloat16 matrices are added up in float32
(and rounded back), and products with packed weights become products with the dequantized ones. The
calibration text is put where the tools look for it, below HOME.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

TOOLS: Final = ("awq", "gptq", "dynamic_quant")


def run(
    tool: str, model: Path, out: Path, *, text: Path, home: Path, flags: list[str], limit: float
) -> str:
    """Run ``tool`` on an MLX checkpoint in a child process; what went wrong, or nothing.

    ``home`` takes the place of the user's folder; ``limit`` is in seconds.
    """
    place = home / ".cache" / "mlx-lm" / "calibration_v5.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(text, place)
    command = [sys.executable, "-m", "benchmarks.stock_quantizers", tool]
    command += ["--model", str(model), "--mlx-path", str(out), *flags]
    environment = {**os.environ, "HOME": str(home)}
    try:
        done = subprocess.run(
            command, env=environment, cwd=home, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"did not finish in {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return ""


def main() -> None:
    """Be the tool named by the first argument."""
    from validate.runtime import prepare_mlx

    assert prepare_mlx(), "MLX is already imported"
    tool = sys.argv.pop(1)
    assert tool in TOOLS, f"{tool} is none of {', '.join(TOOLS)}"
    _fast_products()
    import_module(f"mlx_lm.quant.{tool}").main()


def _fast_products() -> None:
    """Let MLX multiply by dequantized weights, and in float32."""
    mx: Any = import_module("mlx.core")
    product, attention = mx.array.__matmul__, mx.fast.scaled_dot_product_attention

    def widened(a: Any, b: Any) -> Any:
        if a.dtype != mx.bfloat16 or b.dtype != mx.bfloat16:
            return product(a, b)
        return product(a.astype(mx.float32), b.astype(mx.float32)).astype(mx.bfloat16)

    def attended(q: Any, k: Any, v: Any, **given: Any) -> Any:
        wide = (x.astype(mx.float32) for x in (q, k, v))
        return attention(*wide, **given).astype(q.dtype)

    def dense(x: Any, w: Any, scales: Any, biases: Any = None, **given: Any) -> Any:
        transpose = given.pop("transpose", True)
        values = mx.dequantize(w, scales, biases, **given)
        return widened(x, values.swapaxes(-1, -2) if transpose else values)

    mx.array.__matmul__ = widened
    mx.fast.scaled_dot_product_attention = attended
    mx.quantized_matmul = dense


if __name__ == "__main__":
    main()
