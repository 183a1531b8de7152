"""The layout of mlx-lm: names of runtime modules, ``lora_a`` [in, rank], ``lora_b`` [rank, out].

As ``mlx_lm.tuner`` trains and fuses them: embeddings have ``lora_a`` [count, rank] and ``lora_b``
[rank, size], stacked experts [experts, rank, in] and [experts, out, rank]; DoRA adds ``m``.
"""

from __future__ import annotations

from collections.abc import Callable

from arch_maps.rules import Kind, Rule
from converter.adapter.model import Factor, Update
from converter.adapter.read import Adapter
from converter.source import TensorInfo

_ROLES = ("lora_a", "lora_b", "m")


def read_mlx(
    adapter: Adapter, rule_of: Callable[[str], Rule | None], problems: list[str]
) -> list[tuple[Update, Rule]]:
    """Updates with the rule of the map that makes each adapted matrix.

    ``rule_of`` finds the rule of a runtime module; what cannot be used joins ``problems``.
    """
    config = adapter.config
    kind = config.get("fine_tune_type", "lora")
    given = config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        problems.append(f"adapter_config.json: fine_tune_type {kind} is no adapter to fuse")
        return []
    if not isinstance(given, dict) or not {"rank", "scale"} <= given.keys():
        problems.append("adapter_config.json: lora_parameters must state rank and scale")
        return []
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in adapter.header.tensors.items():
        module, _, role = name.rpartition(".")
        if role not in _ROLES:
            problems.append(f"adapter: {name}: is not one of {', '.join(_ROLES)} of a module")
            continue
        modules.setdefault(module, {})[role] = info
    found = []
    for module, roles in sorted(modules.items()):
        wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
        if set(roles) != wanted:
            problems.append(
                f"adapter: {module}: has {', '.join(sorted(roles))}; a {kind} module has "
                f"{', '.join(sorted(wanted))}"
            )
            continue
        rule = rule_of(module)
        if rule is None:
            problems.append(f"adapter: {module}: is no module of this model")
            continue
        found.append((_update(module, roles, rule, given), rule))
    return found


def _update(
    module: str, roles: dict[str, TensorInfo], rule: Rule, given: dict[str, float]
) -> Update:
    a, b = roles["lora_a"], roles["lora_b"]
    magnitude = roles["m"].name if "m" in roles else None
    up, down, experts = Factor(b.name, True), Factor(a.name, True), None
    if rule.kind is Kind.EMBEDDING:
        up, down = Factor(a.name), Factor(b.name)
    elif len(rule.expr.shape) == 3:
        up, down, experts = Factor(b.name), Factor(a.name), int(rule.expr.shape[0])
    return Update(
        module=module,
        up=up,
        down=down,
        rank=int(given["rank"]),
        scale=float(given["scale"]),
        magnitude=magnitude,
        experts=experts,
    )
