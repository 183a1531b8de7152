"""The short names of variants, as ``--variants`` and watch lists spell them."""

from __future__ import annotations

from typing import Final

from quant.recipe import QuantSpec

PLAIN: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MODES: Final = ("mxfp4", "mxfp8", "nvfp4")


def named_variant(
    name: str, *, group_size: int | None = None, method: str = "rtn"
) -> tuple[str | None, QuantSpec | None]:
    """The storage dtype or the quantization that ``name`` stands for; ValueError if for neither.

    ``group_size`` holds for the affine variants only: the microscaled modes fix their own.
    """
    if name in PLAIN:
        return PLAIN[name], None
    if name in MODES:
        return None, QuantSpec.make(name, method=method)
    if name.endswith("bit") and name.removesuffix("bit").isdigit():
        bits = int(name.removesuffix("bit"))
        return None, QuantSpec.make("affine", bits, group_size, method)
    known = ", ".join([*PLAIN, "2bit ... 8bit", *MODES])
    raise ValueError(f"{name!r} is not one of {known}")
