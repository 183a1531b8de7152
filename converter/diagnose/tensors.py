"""Tensors that hold the wrong numbers or lie the wrong way round, beside those of the release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from arch_maps.dtypes import FLOAT_CODES
from arch_maps.ops import Permute, evaluate
from arch_maps.registry import ArchMap
from arch_maps.rules import Rule
from converter.errors import PlanError
from converter.plan.match import match_release
from converter.source import Source
from validate.loaded import Written

_BYTES: Final = frozenset({"U8", "I8", "F8_E4M3", "F8_E5M2"})
_LEFT_OVER: Final = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
_SAMPLE: Final = 4096
_DRAFTERS: Final = re.compile(r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm)(\.|$)")
_BYTE: Final = 255
_FEW: Final = 8
"""A sample with fewer different values says nothing (ones, zeros)."""


def number_problems(tensors: Mapping[str, Written], release: Source | None) -> list[str]:
    """8-bit numbers taken for what they encode: read as whole numbers, with the scales apart.

    Nothing of releases that pack their own codes into bytes, as bitnet does for its runtime.
    """
    if release is not None and any(t.dtype in ("U8", "I8") for t in release.tensors.values()):
        return []
    problems = []
    stored = [n for n, t in tensors.items() if n.endswith(".weight") and t.dtype in _BYTES]
    if stored:
        problems.append(
            f"{_some(stored)} is stored as {tensors[stored[0]].dtype}: a runtime reads the bytes "
            "of 8-bit floats as whole numbers"
        )
    scales = [n for n in tensors if n.endswith(_LEFT_OVER)]
    if scales:
        problems.append(
            f"{_some(scales)} is left over from the release's own quantization: no runtime "
            "applies it"
        )
    whole = [n for n, t in tensors.items() if n.endswith(".weight") and _whole_bytes(t)]
    if whole:
        problems.append(
            f"{_some(whole)} holds whole numbers from 0 to {_BYTE}: 8-bit floats were read as "
            "integers when it was converted"
        )
    return problems


def layout_problems(tensors: Mapping[str, Written], release: Source, arch: ArchMap) -> list[str]:
    """Tensors whose axes are not in the order that the runtime takes.

    Judged by their values too: some shapes are the same either way.
    """
    try:
        rules = match_release(release, arch).rules
    except PlanError:
        return []
    problems = []
    with release.open() as reader:
        for rule in rules:
            found = tensors.get(rule.target)
            if found is None or not _permuted(rule):
                continue
            wanted = tuple(map(int, rule.expr.shape))
            if found.shape != wanted and sorted(found.shape) != sorted(wanted):
                continue
            way = _way(rule, found, reader)
            if way:
                problems.append(
                    f"{rule.target} is {way}: it has shape {list(found.shape)} where the runtime "
                    f"takes {list(wanted)}"
                    + (" (the same shape, with other values)" if found.shape == wanted else "")
                )
    return problems


def lost_drafter(tensors: Mapping[str, Written], release: Source, *, made_here: bool) -> str | None:
    """What to know when the release's multi-token-prediction layers are not in a checkpoint."""
    if made_here:
        return None  # the manifest and the card say so, with the reason
    text = release.config.get("text_config")
    layers = (text if isinstance(text, Mapping) else release.config).get("num_hidden_layers")
    theirs = [name for name in release.tensors if _drafts(name, layers)]
    if not theirs or any(_drafts(name, layers) for name in tensors):
        return None
    return (
        f"the release's {len(theirs)} tensors for predicting further tokens ({_some(theirs)}) are "
        "lost: speculative decoding from the checkpoint itself does not work; convert --mtp makes "
        "a drafter of them"
    )


def _drafts(name: str, layers: Any) -> bool:
    number = re.search(r"\.layers\.(\d+)\.", name)
    beyond = bool(number and isinstance(layers, int) and int(number[1]) >= layers)
    seen = "visual" in name or "vision" in name or "audio" in name
    return bool(_DRAFTERS.search(name)) or (beyond and not seen)


def _permuted(rule: Rule) -> bool:
    return isinstance(rule.expr, Permute)


def _way(rule: Rule, found: Written, reader: Any) -> str | None:
    """How a tensor lies, when not as it should; None when it does, or holds other values."""
    assert isinstance(rule.expr, Permute)
    right = np.asarray(evaluate(rule.expr, reader))
    raw = np.asarray(evaluate(rule.expr.x, reader))
    if _equal(found, right):
        return None
    if _equal(found, raw):
        return "not transposed"
    if _equal(found, np.transpose(right, rule.expr.axes)):
        return "transposed twice"
    return "transposed another way" if found.shape != right.shape else None


def _equal(found: Written, values: np.ndarray) -> bool:
    if found.shape != values.shape or found.dtype not in FLOAT_CODES:
        return False
    return bool(np.allclose(_floats(found), values.astype(np.float32), rtol=1e-2, atol=1e-6))


def _floats(tensor: Written, count: int | None = None) -> np.ndarray:
    """Values of a tensor, or its first ``count``, as float32."""
    bits = tensor.bits()
    if count is not None:
        bits = bits.reshape(-1)[:count]
    if tensor.dtype == "BF16":
        return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return np.asarray(bits).view(kinds[tensor.dtype]).astype(np.float32)


def _whole_bytes(tensor: Written) -> bool:
    """Whether all of a sample are whole numbers from 0 to 255, and not just a few of them."""
    if tensor.dtype not in ("BF16", "F16", "F32") or len(tensor.shape) < 2:
        return False
    values = _floats(tensor, _SAMPLE)
    inside = bool(values.size and values.min() >= 0 and values.max() <= _BYTE)
    return inside and bool((values == np.rint(values)).all()) and len(np.unique(values)) > _FEW


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
