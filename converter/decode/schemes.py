"""The readers of quantized torch releases, by the name that their config gives the scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from converter.decode import (
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gpt_oss,
    gptq,
    modelopt,
)
from converter.decode.build import Builder

Scheme = Callable[[Mapping[str, Any], Builder], None]

SCHEMES: Final[dict[str, Scheme]] = {
    "awq": awq.read,
    "bitnet": bitnet.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "fp8": fp8.read,
    "gguf": gguf.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
    "modelopt_fp4": modelopt.read,
    "mxfp4": gpt_oss.read,
}
"""What reads each ``quant_method``."""
