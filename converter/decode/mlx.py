"""MLX checkpoints: codes, scales and perhaps biases, as the settings in config.json say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converter.decode.build import Builder
from converter.decode.model import Coded, RawReader
from converter.source import TensorInfo
from quant.recipe import QuantSpec


@dataclass(frozen=True, slots=True)
class _Stored:
    """Rows of a matrix as ``spec`` stores them; affine values come in the type of the scales."""

    module: str
    spec: QuantSpec

    def values(self, raw: RawReader, start: int, stop: int, dtype: str) -> np.ndarray:
        """The values as mx.dequantize gives them, computed in ``dtype``."""
        from quant.floats import cast
        from quant.weights import dequantize_rows

        roles = ("scales", "biases") if self.spec.mode == "affine" else ("scales",)
        parts = {role: raw.read_rows(f"{self.module}.{role}", start, stop) for role in roles}
        if self.spec.mode == "affine":
            parts = {role: cast(part, dtype) for role, part in parts.items()}
        parts["weight"] = raw.read_rows(f"{self.module}.weight", start, stop)
        return dequantize_rows(parts, self.spec, dtype)


def spec_of(coded: Coded) -> QuantSpec:
    """The format of a tensor of an MLX checkpoint."""
    assert isinstance(coded.codec, _Stored)
    return coded.codec.spec


def read(settings: Mapping[str, Any], build: Builder, *, dtype: str | None) -> None:
    """Every module with scales; ``dtype`` computes in another type than that of the scales."""
    for name in [name for name in build.tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        scales = build.tensors[name]
        weight = build.tensors.get(f"{module}.weight")
        if weight is None or weight.dtype != "U32":
            build.problem(f"{name}: there are scales but no packed {module}.weight")
            continue
        spec = _spec(settings, module, weight, scales, build)
        if spec is None:
            continue
        own = scales.dtype if spec.mode == "affine" else build.dtype
        roles = [role for role in ("scales", "biases") if f"{module}.{role}" in build.tensors]
        build.add(
            Coded(
                name=weight.name,
                stored=(*weight.shape[:-1], scales.shape[-1] * spec.group_size),
                reads=(weight.name, *(f"{module}.{role}" for role in roles)),
                codec=_Stored(module, spec),
                form=f"MLX {spec.mode} {spec.bits}-bit, groups of {spec.group_size}",
            ),
            dtype=dtype or own,
        )


def _spec(
    settings: Mapping[str, Any],
    module: str,
    weight: TensorInfo,
    scales: TensorInfo,
    build: Builder,
) -> QuantSpec | None:
    own = settings.get(module, settings.get(module.removeprefix("language_model.")))
    merged = {**settings, **own} if isinstance(own, dict) else settings
    try:
        spec = QuantSpec.make(
            str(merged.get("mode") or "affine"), merged.get("bits"), merged.get("group_size")
        )
    except (ValueError, TypeError) as error:
        build.problem(f"config.json: quantization of {module}: {error}")
        return None
    columns = scales.shape[-1] * spec.group_size
    if columns * spec.bits != 32 * weight.shape[-1] or weight.shape[:-1] != scales.shape[:-1]:
        build.problem(
            f"{weight.name}: {list(weight.shape)} with scales {list(scales.shape)} does not fit "
            f"{spec.bits} bits in groups of {spec.group_size}, which config.json states"
        )
        return None
    return spec
