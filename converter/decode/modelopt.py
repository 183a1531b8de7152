"""NVIDIA ModelOpt: FP8 with one scale, NVFP4 with a block scale and one of the tensor.

Settings lie in hf_quant_config.json (``quantization``) or, in newer exports, in config.json.
Inkling has its experts stacked: ``w13_weight`` beside ``w13_weight.scale`` (E4M3, per 16 columns)
and ``w13_weight.scale2`` (one per expert).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from converter.decode.build import Builder, name_matcher
from converter.decode.fp4 import add_nvfp4
from converter.decode.fp8 import ACTIVATIONS, KV_SCALES, add_fp8, add_parts

_ALGORITHMS: Final = ("FP8", "NVFP4", "MIXED_PRECISION")
_STACKED: Final = {
    ".input_amax": "a range for quantizing activations; MLX computes with plain ones",
    ".original_shape": "the shape, which the packed codes and scales give as well",
}
"""What stacked experts have beside their scales."""


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every module with a ``weight_scale``, where the dtype of its weight tells FP8 from NVFP4.

    And every tensor with a ``scale2``.
    """
    nested = settings.get("quantization")
    inner = nested if isinstance(nested, dict) else settings
    algorithm = str(inner.get("quant_algo") or "").upper()
    if algorithm not in _ALGORITHMS:
        build.problem(
            f"quant_algo is {inner.get('quant_algo')!r}; of ModelOpt only "
            f"{', '.join(_ALGORITHMS)} are decoded"
        )
        return
    left = inner.get("exclude_modules", inner.get("ignore"))
    ignored = name_matcher(left, build, where="exclude_modules")
    expected = {"FP8": ("F8_E4M3",), "NVFP4": ("U8",)}.get(algorithm, ("F8_E4M3", "U8"))
    add_parts(build)
    for module in build.with_ending(".weight_scale"):
        if build.stays_plain(module, ignored):
            continue
        name = f"{module}.weight"
        weight = build.tensors.get(name)
        if weight is None or weight.dtype != "F8_E4M3" or name not in build.tables():
            # a look-up table may be in FP8 whatever the linear layers are in
            weight = build.expect(name, expected, needed_by=f"{module}.weight_scale")
        if weight is None:
            continue
        if weight.dtype == "U8":
            add_nvfp4(build, name, name, f"{name}_scale", f"{name}_scale_2", divide=False)
        else:
            add_fp8(build, name, f"{name}_scale", tile=None, powers=False)
    for name in build.with_ending(".scale2"):
        if build.stays_plain(name, ignored):
            continue
        if build.expect(name, expected, needed_by=f"{name}.scale2") is not None:
            add_nvfp4(build, name, name, f"{name}.scale", f"{name}.scale2", divide=False)
            for ending, reason in _STACKED.items():
                build.drop(f"{name}{ending}", reason)
    build.drop_ending({**ACTIVATIONS, **KV_SCALES})
