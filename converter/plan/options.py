"""What the user asks of a conversion: the recipe half of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from arch_maps.dtypes import TORCH_NAMES
from quant.allocate import Allocation
from quant.calibrate.text import Calibration
from quant.recipe import CALIBRATED, QuantSpec
from quant.tune import DEFAULT_ITERATIONS, Tuning

Target = Literal["mlx", "torch"]
MLX_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Storage dtype, quantization and target format; the defaults keep what the release has."""

    dtype: str | None = None
    quant: QuantSpec | None = None
    predicate: str | None = None
    """Name of a stock mixed recipe, for ``--quant-predicate``."""
    target: Target = "mlx"
    dequantize: bool = False
    """Whether the release's own quantization is given up, where MLX could keep it."""
    calibration: Calibration | None = None
    """Which text calibrates; needed by the methods that weigh or propagate activations."""
    target_bits: float | None = None
    """Bits per weight that the whole may have, for ``--q-target-bpw``."""
    target_bytes: int | None = None
    """Bytes that the weight files may have, for ``--q-target-size``."""
    target_group_size: int | None = None
    """The only group size to choose from, None for all."""
    allocation: Allocation | None = None
    """What was chosen for the target; ``quant`` is then the spec of most weights."""
    iterations: int | None = None
    """Steps of method "autoround" in each block, None for its own number."""
    rotate_values: bool = False
    """Whether a rotation of every head is folded into value and output projections."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in MLX_DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}, not one of {', '.join(MLX_DTYPES)}")
        if self.predicate and self.quant is None:
            raise ValueError("--quant-predicate needs -q")
        if self.targeted and (self.quant is None or self.predicate):
            raise ValueError(f"{self.target_text} chooses the formats of -q by itself")
        if self.target_bits is not None and self.target_bytes is not None:
            raise ValueError("--q-target-bpw and --q-target-size are two targets; give one")
        needed = self.quant is not None and self.quant.method in CALIBRATED
        given = self.calibration is not None
        if needed != given and not (given and self.targeted):
            method = self.quant.method if self.quant else "rtn"
            raise ValueError(
                f"--q-method {method} needs calibration text"
                if needed
                else f"--calibration-data has no effect with --q-method {method}"
            )
        if self.iterations is not None and self.tuning is None:
            method = self.quant.method if self.quant else "rtn"
            raise ValueError(f"--tuning-iterations has no effect with --q-method {method}")
        if self.target == "torch" and self.quant is not None:
            raise ValueError("--to torch writes plain tensors; it cannot be combined with -q")

    @property
    def dtype_code(self) -> str | None:
        """The storage dtype as a safetensors code."""
        return TORCH_NAMES[self.dtype] if self.dtype else None

    @property
    def tuning(self) -> Tuning | None:
        """How codes are tuned, None for methods that do not."""
        if self.quant is None or self.quant.method != "autoround":
            return None
        return Tuning(iterations=self.iterations or DEFAULT_ITERATIONS)

    @property
    def targeted(self) -> bool:
        """Whether formats are chosen for a size."""
        return self.target_bits is not None or self.target_bytes is not None

    @property
    def target_text(self) -> str:
        """The target as the command line states it."""
        if self.target_bytes is not None:
            return f"--q-target-size {self.target_bytes}"
        return f"--q-target-bpw {self.target_bits or 0:g}"

    @property
    def suffix(self) -> str:
        """What the name of the output says about it: ``4bit``, ``mxfp4``, ``bf16`` ..."""
        if self.target_bits is not None:
            return f"{self.target_bits:g}bpw"
        if self.target_bytes is not None:
            return f"{self.target_bytes / 1e9:.3g}GB"
        if self.predicate:
            return self.predicate.removesuffix("_recipe").replace("_", "-")
        if self.quant is not None:
            affine = self.quant.mode == "affine"
            return f"{self.quant.bits}bit" if affine else self.quant.mode
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        return short[self.dtype] if self.dtype else self.target

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data."""
        quant = None
        if self.quant is not None:
            quant = {**self.quant.to_config(), "method": self.quant.method}
        recipe: dict[str, Any] = {
            "dtype": self.dtype,
            "quantization": quant,
            "predicate": self.predicate,
            "target": self.target,
        }
        if self.dequantize:
            recipe["dequantize"] = True
        if self.calibration is not None:
            recipe["calibration"] = self.calibration.to_json()
        if self.tuning is not None:
            recipe["tuning"] = self.tuning.to_json()
        if self.targeted:
            recipe["target_size"] = {"bits": self.target_bits, "bytes": self.target_bytes}
            if self.target_group_size is not None:
                recipe["target_size"]["group_size"] = self.target_group_size
        if self.allocation is not None:
            recipe["allocation"] = self.allocation.to_json()
        if self.rotate_values:
            recipe["rotate_values"] = True
        return recipe
