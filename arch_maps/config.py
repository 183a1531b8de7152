"""Spelling a config in every way that the runtimes read it.

Runtimes ignore what they do not know and fall back to defaults that happen to fit one released
size. So whatever matters is written out under each name that either runtime looks for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Final

from arch_maps.facts import Facts

NATIVE_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
"""Position scalings that both runtimes compute as the reference does."""
_TAGGED: Final = ("Infinity", "-Infinity", "NaN")


def start(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy without quantization settings, with tagged floats as plain numbers."""
    out = {key: _plain(value) for key, value in copy.deepcopy(dict(config)).items()}
    for stale in ("quantization", "quantization_config"):
        out.pop(stale, None)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _TAGGED:
            return float(value["__float__"])
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def rope(facts: Facts, *, default_theta: float = 10000.0) -> dict[str, Any]:
    """The effective position settings: always ``rope_theta`` and ``rope_type``.

    As transformers 5 reads them: ``rope_scaling`` before ``rope_parameters``, with top-level
    ``rope_theta`` and ``partial_rotary_factor`` filling what they leave open.
    """
    data = facts.data
    found = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        facts.problem(f"config.json: {facts.path}rope_parameters must be an object")
        found = {}
    settings: dict[str, Any] = dict(found)
    kind = settings.pop("type", None) or "default"
    settings.setdefault("rope_type", kind)
    outer = data.get("rope_parameters")
    inherited = outer.get("rope_theta") if isinstance(outer, Mapping) else None
    settings.setdefault("rope_theta", data.get("rope_theta") or inherited or default_theta)
    if data.get("partial_rotary_factor") is not None:
        settings.setdefault("partial_rotary_factor", data["partial_rotary_factor"])
    theta = settings["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta):
        facts.problem(f"config.json: {facts.path}rope_theta must be a finite number, not {theta!r}")
    return settings


def spell_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every spelling of the position settings that a runtime reads."""
    kind = settings["rope_type"]
    both = {**settings, "type": kind, "rope_type": kind, **_yarn_scale(settings)}
    scaling = {key: value for key, value in both.items() if key != "rope_theta"}
    spelled: dict[str, Any] = {
        "rope_theta": settings["rope_theta"],
        "rope_parameters": both,
        "rope_scaling": None if kind == "default" else scaling,
    }
    if "partial_rotary_factor" in settings:
        spelled["partial_rotary_factor"] = settings["partial_rotary_factor"]
    return spelled


def _yarn_scale(settings: Mapping[str, Any]) -> dict[str, float]:
    """The ``mscale`` that makes the runtimes scale attention as the reference does.

    They compute 0.1 * mscale * ln(factor) + 1, over the same of ``mscale_all_dim``; the reference
    takes ``attention_factor`` where it is stated, and ``mscale`` only beside ``mscale_all_dim``.
    """
    stated, factor = settings.get("attention_factor"), settings.get("factor")
    if settings["rope_type"] != "yarn" or not factor or factor <= 1:
        return {}
    if stated:
        return {"mscale": (stated - 1) / (0.1 * math.log(factor)), "mscale_all_dim": 0}
    return {} if settings.get("mscale_all_dim") else {"mscale": 1.0}


def require_rope_type(
    facts: Facts, settings: Mapping[str, Any], *, allowed: tuple[str, ...] = NATIVE_ROPE_TYPES
) -> None:
    """A position scaling that the runtimes would ignore or compute otherwise is a problem."""
    if settings["rope_type"] not in allowed:
        facts.problem(
            f"config.json: {facts.path}rope_type is {settings['rope_type']!r}; the runtimes "
            f"compute only {', '.join(allowed)} as the reference does"
        )


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that the release declares for its weights, as torch names it."""
    text = config.get("text_config")
    nested = text if isinstance(text, Mapping) else {}
    for section in (config, nested):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section.get(key), str):
                return str(section[key]).removeprefix("torch.")
    return None


def spell_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write ``dtype`` under every name, at the top and in each sub-config, in place."""
    config["dtype"] = config["torch_dtype"] = dtype
    for section in config.values():
        if isinstance(section, dict) and ("dtype" in section or "torch_dtype" in section):
            section["dtype"] = section["torch_dtype"] = dtype
