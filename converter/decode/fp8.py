"""FP8 weights with a float or power-of-two scale per block, row or tensor.

``quant_method: fp8`` (DeepSeek, Qwen3, Mistral): ``X`` in F8_E4M3 beside ``X_scale_inv``, which
multiplies, whatever it is called; ``weight_block_size`` states its blocks. DeepSeek V4 calls it
``scale``; older exports ``weight_scale``. ``fbgemm_fp8``: ``weight_scale`` per row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from arch_maps.ops import Shape
from converter.decode.build import Builder, name_matcher, positive
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from converter.source import TensorInfo
from quant.decode import tables
from quant.decode.block import Block
from quant.recipe import QuantSpec

FLOATS: Final = ("F32", "BF16", "F16")
ACTIVATIONS: Final = {
    ending: "a scale for quantizing activations; MLX computes with plain ones"
    for ending in (
        ".input_scale",
        ".activation_scale",
        ".input_scale_ub",
        ".input_global_scale",
        ".output_scale",
    )
}
"""Tensors of schemes that quantize activations as well."""
KV_SCALES: Final = {
    ending: "a scale of a quantized KV cache; the runtimes' caches have their own"
    for ending in (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".kv_scale")
}


@dataclass(frozen=True, slots=True)
class Fp8(BlockCodec):
    """Rows of ``weight`` (..., out, in) times ``scale``, each element of it over a tile of both."""

    weight: str
    scale: str
    shape: Shape
    tile: tuple[int, int]
    e8m0: bool = False
    wide: bool = False
    """Whether codes are E5M2."""
    factor: str = ""
    """A second scale, of the whole tensor, that multiplies the first."""

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows of axis 0, leading axes flattened."""
        found = None
        if codes:
            stored = raw.read_rows(self.weight, start, stop)
            found = stored.view(np.uint8).reshape(-1, self.shape[-1])
        return Block(
            columns=self.shape[-1],
            table=tables.e5m2() if self.wide else tables.e4m3(),
            codes=found,
            scales=np.ascontiguousarray(self._scales(raw, start, stop)),
            group=self.tile[1],
        )

    def _scales(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        """(rows, groups) float32 scales of flattened rows."""
        out, (high, wide) = self.shape[-2], self.tile
        groups = -(-self.shape[-1] // wide)
        if len(self.shape) == 3:
            stored = self._floats(raw.read_rows(self.scale, start, stop))
            tiles = stored.reshape(stop - start, -(-out // high), groups)
            return tiles[:, np.arange(out) // high].reshape(-1, groups)
        if high == out:
            whole = self._floats(raw.read_rows(self.scale, 0, 1)).reshape(1, groups)
            return np.broadcast_to(whole, (stop - start, groups))
        first, last = start // high, (stop - 1) // high + 1
        stored = self._floats(raw.read_rows(self.scale, first, last))
        picked: np.ndarray = stored.reshape(-1, groups)[np.arange(start, stop) // high - first]
        return picked

    def _floats(self, scale: np.ndarray) -> np.ndarray:
        return tables.e8m0(scale.view(np.uint8)) if self.e8m0 else scale.astype(np.float32)


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every FP8 tensor with the scale beside it."""
    tile = settings.get("weight_block_size")
    if tile is not None and not (
        isinstance(tile, list) and len(tile) == 2 and all(map(positive, tile))
    ):
        build.problem(f"config.json: weight_block_size is {tile!r}, not two whole numbers")
        return
    powers = settings.get("scale_fmt") == "ue8m0"
    ignored = name_matcher(
        settings.get("modules_to_not_convert"), build, where="modules_to_not_convert"
    )
    add_parts(build, powers=powers)
    for name in fp8_names(build):
        module = name.removesuffix(".weight")
        if build.stays_plain(module, ignored):
            continue
        beside = [f"{name}_scale_inv", f"{name}_scale", f"{module}.scale"]
        scales = [other for other in beside if other in build.tensors and other != name]
        if len(scales) != 1:
            have = " and ".join(scales) or f"no {beside[0]}"
            build.problem(f"{name}: is FP8 with {have}; it cannot be decoded")
            continue
        add_fp8(build, name, scales[0], tile=tuple(tile) if tile else None, powers=powers)
    build.drop_ending({**ACTIVATIONS, **KV_SCALES})


def read_fbgemm(settings: Mapping[str, Any], build: Builder) -> None:
    """FP8 matrices with a scale per row, as FBGEMM computes them."""
    for name in fp8_names(build):
        add_fp8(build, name, f"{name}_scale", tile=None, powers=False, rows_only=True)
    build.drop_ending(ACTIVATIONS)


def fp8_names(build: Builder) -> list[str]:
    """Tensors in FP8 that are no scales themselves."""
    return [
        info.name
        for info in build.tensors.values()
        if info.dtype in ("F8_E4M3", "F8_E5M2") and not info.name.endswith("_scale")
    ]


def add_parts(build: Builder, *, powers: bool = False) -> None:
    """Tables in parts ``X.PART.weight`` with one scale of all, ``X.weight_scale``.

    As Qwen3.8-Flash-Next has its n-grams. Lists of what is left plain name linear layers, and
    cover such a table in releases that quantize it, so they are not asked.
    """
    parts: dict[str, list[str]] = defaultdict(list)
    for name in fp8_names(build):
        module = name.removesuffix(".weight")
        above = module.rpartition(".")[0]
        own = any(f"{name}{ending}" in build.tensors for ending in ("_scale_inv", "_scale"))
        if above and not own and f"{above}.weight" not in build.tensors:
            parts[f"{above}.weight_scale"].append(name)
    for scale, names in parts.items():
        found = build.tensors.get(scale)
        if found is None:
            continue
        for name in names:
            build.tensors[scale] = found  # which every part takes with it
            add_fp8(build, name, scale, tile=None, powers=powers)


def add_fp8(
    build: Builder,
    name: str,
    scale: str,
    *,
    tile: tuple[int, ...] | None,
    powers: bool,
    rows_only: bool = False,
) -> None:
    """One FP8 tensor; without ``tile`` its scale is of the tensor, or of each row.

    ``powers`` says that the release promises powers of two.
    """
    weight, found = build.tensors[name], build.tensors.get(scale)
    if len(weight.shape) not in (2, 3):
        build.problem(f"{name}: FP8 of {len(weight.shape)} axes has no scale to go with it")
        return
    *lead, out, columns = weight.shape
    shapes: dict[Shape, tuple[int, int]] = {}
    if tile is not None:
        high, wide = min(tile[0], out), min(tile[1], columns)
        shapes[(*lead, -(-out // high), -(-columns // wide))] = (high, wide)
    else:
        shapes[(*lead, out, 1)] = (1, columns)
        if not lead:
            shapes[(out,)] = (1, columns)
        if not rows_only:
            single = [(*lead, 1, 1), (*lead, 1), tuple(lead)] + ([(1,)] if not lead else [])
            shapes.update({shape: (out, columns) for shape in single})
    byte_scales = ("F8_E8M0", "U8")
    found = build.expect(scale, (*FLOATS, *byte_scales), *shapes, needed_by=name)
    if found is None:
        return
    chosen = shapes[found.shape]
    e8m0 = found.dtype in byte_scales
    wide_codes = weight.dtype == "F8_E5M2"
    native = None
    if (e8m0 or powers) and not wide_codes and chosen[1] % 32 == 0 and columns % 32 == 0:
        native = Native(spec=QuantSpec.make("mxfp8"))
    build.add(
        Coded(
            name=name,
            stored=weight.shape,
            reads=(name, scale),
            codec=Fp8(name, scale, weight.shape, chosen, e8m0, wide_codes),
            form=_form(weight, tile or chosen, powers=e8m0 or powers),
            native=native,
        )
    )


def _form(weight: TensorInfo, tile: tuple[int, ...], *, powers: bool) -> str:
    kind = "FP8 E5M2" if weight.dtype == "F8_E5M2" else "FP8"
    what = ", powers of two" if powers else ""
    if tile == weight.shape[-2:]:
        return f"{kind} with one scale{what}"
    if tile == (1, weight.shape[-1]):
        return f"{kind} with a scale per row{what}"
    return f"{kind} with {tile[0]}x{tile[1]} block scales{what}"
