"""compressed-tensors (llm-compressor): integers, FP8 and FP4 under one config.

Codes are ``weight_packed``, a little-endian bitstream per row with 2**(bits-1) added (zero points
packed so along the rows), or a plain ``weight`` in I8 or F8_E4M3. NVFP4 divides its block scales
by ``weight_global_scale``; MXFP4 and MXFP8 have E8M0 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from converter.decode.build import Builder, compiled, groups_for, integer, name_matcher, positive
from converter.decode.fp4 import add_mxfp4, add_nvfp4
from converter.decode.fp8 import ACTIVATIONS, FLOATS, KV_SCALES, add_fp8
from converter.decode.model import BlockCodec, Coded, Native, RawReader
from converter.decode.patterns import Expression
from quant.decode import tables, unpack
from quant.decode.block import Block
from quant.packing import unpack_rows
from quant.recipe import QuantSpec

_PACKED: Final = "pack-quantized"
_FORMATS: Final = (
    _PACKED,
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_BITS: Final = (2, 4, 8)
"""Widths that every version of the library packs alike."""


@dataclass(frozen=True, slots=True)
class Integers(BlockCodec):
    """Rows of integers [out, in], packed or one a byte, with a scale per group or row."""

    module: str
    bits: int
    group: int
    out: int
    columns: int
    packed: bool
    scale_rows: int
    zeros: str
    """"packed", "plain" or "" for none."""

    def block(self, raw: RawReader, start: int, stop: int, *, codes: bool = True) -> Block:
        """Rows ``[start, stop)``."""
        scales = self._rows(raw, "weight_scale", start, stop).astype(np.float32)
        return Block(
            columns=self.columns,
            table=tables.offset(self.bits),
            codes=self._codes(raw, start, stop) if codes else None,
            scales=scales,
            zeros=self._zeros(raw, start, stop) if self.zeros else None,
            group=self.group,
        )

    def _codes(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        if self.packed:
            words = raw.read_rows(f"{self.module}.weight_packed", start, stop)
            return unpack_rows(words.view(np.uint32), self.bits)
        return raw.read_rows(f"{self.module}.weight", start, stop).view(np.uint8) ^ np.uint8(0x80)

    def _rows(self, raw: RawReader, role: str, start: int, stop: int) -> np.ndarray:
        if self.scale_rows == self.out:
            return raw.read_rows(f"{self.module}.{role}", start, stop).reshape(stop - start, -1)
        whole = raw.read_rows(f"{self.module}.{role}", 0, 1).reshape(1, 1)
        return np.broadcast_to(whole, (stop - start, 1))

    def _zeros(self, raw: RawReader, start: int, stop: int) -> np.ndarray:
        """(rows, groups), as signed integers."""
        if self.zeros == "plain":
            plain = self._rows(raw, "weight_zero_point", start, stop)
            return np.ascontiguousarray(plain.astype(np.float32))
        each = 32 // self.bits
        first = start // each
        words = raw.read_rows(f"{self.module}.weight_zero_point", first, -(-stop // each))
        codes = unpack.words(unpack.transposed(words), self.bits)
        stored = codes[:, start - first * each : stop - first * each]
        return np.ascontiguousarray(tables.offset(self.bits)[stored].T)


def read(settings: Mapping[str, Any], build: Builder) -> None:
    """Every module that a config group quantizes, by the format of its group."""
    for key in ("sparsity_config", "transform_config"):
        found = settings.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            build.problem(f"config.json: {key} changes what the weights mean; it is not decoded")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        build.problem("config.json: compressed-tensors without config_groups")
        return
    ignored = name_matcher(settings.get("ignore"), build, where="ignore")
    matchers = [
        (_targets(group, build), group) for group in groups.values() if isinstance(group, dict)
    ]
    endings = (".weight_packed", ".weight_scale")
    for module in dict.fromkeys(m for ending in endings for m in build.with_ending(ending)):
        if build.stays_plain(module, ignored):
            continue
        chosen = [group for names, group in matchers if _matches(names, module)]
        if not chosen:
            build.problem(f"{module}: is quantized, but no group of config_groups names it")
            continue
        own = chosen[-1] if len(chosen) == 1 else _most_specific(matchers, module)
        _add(module, own, str(own.get("format") or settings.get("format")), build)
    gone = {".weight_shape": "the shape, which the packed codes and scales give as well"}
    build.drop_ending({**ACTIVATIONS, **KV_SCALES, **gone})


_Names = list[str | Expression]


def _targets(group: Mapping[str, Any], build: Builder) -> _Names:
    found = group.get("targets") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        build.problem("config.json: targets must be a list of names")
        return []
    names: _Names = []
    for name in found:
        if name.startswith("re:"):
            pattern = compiled(name.removeprefix("re:"), build, where="targets")
            names += [pattern] if pattern is not None else []
        else:
            names.append(name)
    return names


def _matches(names: _Names, module: str) -> bool:
    return any(
        name.match(module)
        if isinstance(name, Expression)
        else name == "Linear" or name == module or module.endswith(f".{name}")
        for name in names
    )


def _most_specific(matchers: list[tuple[_Names, dict[str, Any]]], module: str) -> dict[str, Any]:
    """Of several groups, the first that names the module otherwise than as a Linear."""
    named = [g for names, g in matchers if _matches([n for n in names if n != "Linear"], module)]
    return (named or [g for names, g in matchers if _matches(names, module)])[0]


def _add(module: str, group: Mapping[str, Any], format: str, build: Builder) -> None:
    weights = group.get("weights")
    if format not in _FORMATS or not isinstance(weights, dict):
        build.problem(
            f"{module}: format {format!r} of compressed-tensors is not decoded; only "
            f"{', '.join(_FORMATS)} are"
        )
        return
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if format == "nvfp4-pack-quantized":
        packed, scale, whole = (f"{module}.weight_{e}" for e in ("packed", "scale", "global_scale"))
        add_nvfp4(build, f"{module}.weight", packed, scale, whole, divide=True)
    elif format == "mxfp4-pack-quantized":
        add_mxfp4(build, module)
    elif kind == "float" and f"{module}.weight" in build.tensors:
        tile = weights.get("block_structure") if strategy == "block" else None
        if format == "mxfp8-quantized":
            tile = [1, 32]
        if tile is not None and not (
            isinstance(tile, list) and len(tile) == 2 and all(map(positive, tile))
        ):
            build.problem(f"{module}: block_structure is {tile!r}, not two whole numbers")
            return
        if strategy not in ("block", "channel", "tensor", "group"):
            build.problem(f"{module}: strategy {strategy!r} of FP8 weights is not decoded")
            return
        if build.tensors[f"{module}.weight"].dtype != "F8_E4M3":
            build.problem(f"{module}.weight: is not F8_E4M3, as config.json says")
            return
        add_fp8(
            build,
            f"{module}.weight",
            f"{module}.weight_scale",
            tile=tuple(tile) if tile else None,
            powers=False,
        )
        build.drop(f"{module}.weight_zero_point", "zeros of a format that has no zero points")
    elif kind == "int":
        _integers(module, weights, build, packed=format == _PACKED)
    else:
        build.problem(f"{module}: {format} of {kind!r} weights is not decoded")


def _integers(module: str, weights: Mapping[str, Any], build: Builder, *, packed: bool) -> None:
    bits, strategy = integer(weights, "num_bits", 8), weights.get("strategy")
    name = f"{module}.weight_packed" if packed else f"{module}.weight"
    if (bits not in _BITS) if packed else bits != 8:
        build.problem(f"{module}: integers of {bits!r} bits are packed differently by versions")
        return
    assert bits is not None
    weight = build.expect(name, ("I32",) if packed else ("I8",), needed_by=module)
    if weight is None:
        return
    if len(weight.shape) != 2:
        build.problem(f"{name}: {list(weight.shape)} is no matrix")
        return
    out = weight.shape[0]
    columns = weight.shape[1] * 32 // bits if packed else weight.shape[1]
    group = integer(weights, "group_size") if strategy == "group" else columns
    if strategy not in ("group", "channel", "tensor") or group is None or not positive(group):
        build.problem(f"{module}: strategy {strategy!r} of integer weights is not decoded")
        return
    if columns % group:
        build.problem(f"{name}: {columns} columns do not divide into groups of {group}")
        return
    if f"{module}.weight_g_idx" in build.tensors:
        build.problem(f"{module}: weight_g_idx scatters its groups, which is not decoded")
        return
    groups = columns // group
    rows = 1 if strategy == "tensor" else out
    shapes = [(1,), (1, 1), ()] if rows == 1 else [(out, groups)] + [(out,)] * (groups == 1)
    scale = build.expect(f"{module}.weight_scale", FLOATS, *shapes, needed_by=name)
    zeros, symmetric = "", weights.get("symmetric", True)
    point = f"{module}.weight_zero_point"
    if not symmetric:
        each = 32 // bits
        found = build.expect(
            point,
            ("I32", "I8"),
            *((-(-out // each), groups), *shapes) if packed else shapes,
            needed_by=name,
        )
        if found is None:
            return
        zeros = "packed" if found.dtype == "I32" and packed else "plain"
    if scale is None:
        return
    size = groups_for(group, columns)
    native = None
    if size is not None:
        spec = QuantSpec.make("affine", bits, size)
        native = Native(spec=spec, scales=scale.dtype, products=not symmetric)
    what = f"groups of {group}" if strategy == "group" else f"a scale per {strategy}"
    build.add(
        Coded(
            name=f"{module}.weight",
            stored=(out, columns),
            reads=(name, scale.name, *([point] if zeros else [])),
            codec=Integers(module, bits, group, out, columns, packed, rows, zeros),
            form=f"compressed-tensors int{bits}, {what}{'' if symmetric else ', zero points'}",
            native=native,
        )
    )
    build.drop(point, "zeros of a symmetric format")
