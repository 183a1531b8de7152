"""The quantization that config.json declares, held against the tensors that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from validate.loaded import Written

_SCALES: Final = ".scales"
_WORD_BITS: Final = 32
_SHOWN: Final = 4


def quantization_problems(tensors: Mapping[str, Written], config: Mapping[str, Any]) -> list[str]:
    """Keys that name no module, packed modules without settings, settings that do not fit."""
    packed = sorted(name.removesuffix(_SCALES) for name in tensors if name.endswith(_SCALES))
    declared = config.get("quantization")
    if not isinstance(declared, Mapping):
        if packed and not isinstance(config.get("quantization_config"), Mapping):
            return [
                f"config.json has no quantization, but {_some(packed)} is packed: a runtime reads "
                "the codes as weights"
            ]
        declared = config.get("quantization_config")
    if not isinstance(declared, Mapping):
        return []
    if not packed:
        return ["config.json declares a quantization, but no tensor is packed (no .scales)"]
    modules = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    own = {k: v for k, v in declared.items() if isinstance(v, Mapping | bool)}
    unknown = sorted(key for key in own if key not in modules)
    problems = []
    if unknown:
        problems.append(
            f"quantization key {_some(unknown)} is the path of no module"
            f"{_near(unknown[0], modules)}: its settings are not used"
        )
    bits, group = declared.get("bits"), declared.get("group_size")
    for module in packed:
        settings = own.get(module)
        if settings is False:
            problems.append(f"quantization says that {module} is not packed, but it is")
            continue
        given = settings if isinstance(settings, Mapping) else {}
        problem = _misfit(tensors, module, given.get("bits", bits), given.get("group_size", group))
        problems += [problem] if problem else []
    return problems


def _misfit(tensors: Mapping[str, Written], module: str, bits: Any, group: Any) -> str | None:
    """Why bits and group size cannot be those of a packed module, by its shapes."""
    weight, scales = tensors.get(f"{module}.weight"), tensors[f"{module}{_SCALES}"]
    if weight is None:
        return f"{module} has scales and no weight"
    if not isinstance(bits, int) or not isinstance(group, int):
        return f"{module} is packed, and config.json gives no bits or group size for it"
    # A row of w words holds 32 w / bits codes, and as many scales as groups.
    if weight.shape[-1] * _WORD_BITS != scales.shape[-1] * group * bits:
        return (
            f"{module} is {list(weight.shape)} with scales {list(scales.shape)}, which is not "
            f"{bits} bits in groups of {group} as config.json says"
        )
    return None


def _near(key: str, modules: set[str]) -> str:
    """The module that a key of another tree means, by its end."""
    tail = ".".join(key.split(".")[-4:])
    return next((f" (did it mean {name}?)" for name in sorted(modules) if name.endswith(tail)), "")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
