"""The layout of PEFT: names of torch modules, ``lora_A`` [rank, in] and ``lora_B`` [out, rank].

Scaling and patterns as in ``peft.tuners.lora``: alpha / rank, or alpha / sqrt(rank) with rslora;
a pattern holds for the module whose path it matches at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from converter.adapter.model import Factor, Update
from converter.adapter.read import Adapter
from converter.decode.patterns import Budget, Expression
from converter.source import TensorInfo

_PREFIX: Final = "base_model.model."
_ROLES: Final = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_OTHER_MATHS: Final = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Settings under which an adapter is more than a low-rank sum of named matrices."""
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that replace the base's own weights, so that only PEFT has the base."""


def read_peft(adapter: Adapter, problems: list[str]) -> tuple[list[Update], dict[str, str]]:
    """Updates by torch module, and whole tensors as {torch parameter: adapter tensor}.

    What cannot be used is added to ``problems``. An update is for a matrix stored [out, in].
    """
    config = adapter.config
    _check(config, problems)
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, str] = {}
    for name, info in adapter.header.tensors.items():
        path = name.removeprefix(_PREFIX)
        if path == name:
            problems.append(f"adapter: {name}: does not begin with {_PREFIX}")
            continue
        role = next((role for end, role in _ROLES.items() if path.endswith(end)), None)
        if role is not None:
            end = next(end for end in _ROLES if path.endswith(end))
            modules.setdefault(path.removesuffix(end), {})[role] = info
        elif "lora_" in path.rpartition(".")[2] or ".lora_" in path:
            problems.append(f"adapter: {name}: is no tensor of a plain LoRA or DoRA")
        else:
            whole[path.replace(".base_layer.", ".")] = name
    budget = Budget()
    updates = [
        _update(path, roles, config, budget, problems) for path, roles in sorted(modules.items())
    ]
    return [update for update in updates if update is not None], whole


def _check(config: Mapping[str, Any], problems: list[str]) -> None:
    kind = str(config.get("peft_type"))
    if kind.upper() != "LORA":
        problems.append(f"adapter_config.json: peft_type is {kind}; only LORA can be fused")
    problems += [
        f"adapter_config.json: {key} is set, which is more than a sum that can be fused"
        for key in _OTHER_MATHS
        if config.get(key)
    ]
    initial = str(config.get("init_lora_weights", True)).lower()
    if initial.startswith(_CHANGED_BASE):
        problems.append(
            f"adapter_config.json: init_lora_weights {initial} changed the base model; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, then fuse that"
        )


def _update(
    path: str,
    roles: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    budget: Budget,
    problems: list[str],
) -> Update | None:
    table = "embedding_up" in roles or "embedding_down" in roles
    down = roles.get("embedding_down" if table else "down")
    up = roles.get("embedding_up" if table else "up")
    dora = bool(config.get("use_dora"))
    if up is None or down is None or len(roles) != 2 + ("magnitude" in roles):
        found = ", ".join(info.name for info in roles.values())
        problems.append(f"adapter: {path}: is not a pair of factors: {found}")
        return None
    if dora != ("magnitude" in roles):
        says = "needs a magnitude vector" if dora else "has a magnitude vector"
        problems.append(f"adapter: {path}: {says}, but use_dora is {str(dora).lower()}")
        return None
    if len(up.shape) != 2 or len(down.shape) != 2:
        problems.append(f"adapter: {path}: adapts no matrix but a tensor of {list(up.shape)}")
        return None
    rank = _setting(path, config.get("rank_pattern"), config.get("r"), budget)
    alpha = _setting(path, config.get("alpha_pattern"), config.get("lora_alpha"), budget)
    if not _positive(rank) or not _positive(alpha):
        problems.append(f"adapter_config.json: r {rank!r} and lora_alpha {alpha!r} of {path}")
        return None
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    magnitude = roles["magnitude"].name if dora else None
    made = Update(
        module=path,
        up=Factor(up.name),
        down=Factor(down.name),
        rank=int(rank),
        scale=float(scale),
        magnitude=magnitude,
    )
    return made.flipped if table else made  # a table is stored [count, size]


def _setting(path: str, patterns: Any, default: Any, budget: Budget) -> Any:
    if patterns is not None and not isinstance(patterns, dict):
        return f"of patterns {patterns!r}"
    starts = [0, *(place + 1 for place, sign in enumerate(path) if sign == ".")]
    for pattern, value in (patterns or {}).items():
        try:
            ending = Expression(f"(?:{pattern})$", budget)
            matched = any(ending.match(path, start) for start in starts)
        except re.error:
            return f"of pattern {pattern!r}"
        except ValueError as problem:
            return f"of pattern {pattern!r}, which {problem},"
        if matched:
            return value
    return default


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
