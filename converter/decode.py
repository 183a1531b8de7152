"""Decoding the source's own quantization, as a stage before the map.

An MLX checkpoint stores a quantized matrix as codes, scales and perhaps biases. Seen through
``decoded``, it is the plain matrix again: the same names, logical shapes, rows on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from arch_maps.config import stored_dtype
from arch_maps.dtypes import TORCH_NAMES
from arch_maps.ops import RowReader
from converter.errors import PlanError
from converter.source import Source, TensorInfo
from quant.recipe import QuantSpec


def decoded(source: Source, *, dtype: str | None = None) -> tuple[Source, dict[str, QuantSpec]]:
    """An MLX checkpoint with its quantized matrices as plain ones; raises PlanError.

    Values have the dtype of the scales, as mx.dequantize gives them, or are computed in ``dtype``
    (F32: the kernels' own precision, without a last rounding). The second value says how each
    decoded tensor is stored. A source without MLX quantization comes back unchanged.
    """
    settings = source.config.get("quantization")
    if not isinstance(settings, dict):
        return source, {}
    tensors: dict[str, TensorInfo] = dict(source.tensors)
    specs: dict[str, QuantSpec] = {}
    problems: list[str] = []
    for name, scales in source.tensors.items():
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        weight = tensors.get(f"{module}.weight")
        if weight is None or weight.dtype != "U32":
            problems.append(f"{name}: there are scales but no packed {module}.weight")
            continue
        spec = _spec(settings, module, weight, scales, problems)
        if spec is None:
            continue
        specs[weight.name] = spec
        columns = scales.shape[-1] * spec.group_size
        own = scales.dtype if spec.mode == "affine" else _dtype(source.config)
        shape = (*weight.shape[:-1], columns)
        tensors[weight.name] = replace(weight, shape=shape, dtype=dtype or own)
        for role in ("scales", "biases"):
            tensors.pop(f"{module}.{role}", None)
    if problems:
        raise PlanError(problems)
    return replace(source, tensors=tensors), specs


class DecodingReader:
    """Rows of a source with its quantized matrices decoded."""

    def __init__(self, raw: RowReader, source: Source, specs: Mapping[str, QuantSpec]) -> None:
        """Read ``raw`` bytes; ``source`` is the decoded view and ``specs`` says what to decode."""
        self._raw = raw
        self._source = source
        self._specs = specs

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor, decoded if it is quantized."""
        from quant.floats import cast
        from quant.weights import dequantize_rows

        spec = self._specs.get(name)
        if spec is None:
            return self._raw.read_rows(name, start, stop)
        dtype = self._source.tensors[name].dtype
        module = name.removesuffix(".weight")
        roles = ("scales", "biases") if spec.mode == "affine" else ("scales",)
        parts = {role: self._raw.read_rows(f"{module}.{role}", start, stop) for role in roles}
        if spec.mode == "affine":
            parts = {role: cast(part, dtype) for role, part in parts.items()}
        parts["weight"] = self._raw.read_rows(name, start, stop)
        return dequantize_rows(parts, spec, dtype)


def _spec(
    settings: Mapping[str, Any],
    module: str,
    weight: TensorInfo,
    scales: TensorInfo,
    problems: list[str],
) -> QuantSpec | None:
    own = settings.get(module, settings.get(module.removeprefix("language_model.")))
    merged = {**settings, **own} if isinstance(own, dict) else settings
    try:
        spec = QuantSpec.make(
            str(merged.get("mode") or "affine"), merged.get("bits"), merged.get("group_size")
        )
    except (ValueError, TypeError) as error:
        problems.append(f"config.json: quantization of {module}: {error}")
        return None
    columns = scales.shape[-1] * spec.group_size
    if columns * spec.bits != 32 * weight.shape[-1] or weight.shape[:-1] != scales.shape[:-1]:
        problems.append(
            f"{weight.name}: {list(weight.shape)} with scales {list(scales.shape)} does not fit "
            f"{spec.bits} bits in groups of {spec.group_size}, which config.json states"
        )
        return None
    return spec


def _dtype(config: Mapping[str, Any]) -> str:
    return TORCH_NAMES.get(stored_dtype(config) or "bfloat16", "BF16")
