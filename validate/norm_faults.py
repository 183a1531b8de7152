"""Taking documented faults of norms out of a loaded text model, in memory.

Each function returns patches (module, attribute, what belongs there) for a model of either
runtime; those that need a fact that the runtime throws away take the checkpoint's config.
"""

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def stated_epsilon(model: Any, config: Config) -> list[Patch]:
    """The epsilon of nanochat's weightless norms, which the runtimes fix in code."""
    mx: Any = import_module("mlx.core")
    code = import_module(type(getattr(model, "language_model", model)).__module__)
    epsilon = config["rms_norm_eps"]
    return [(code, "rms_norm", lambda x: mx.fast.rms_norm(x, None, epsilon))]


def grouped_mamba2(model: Any, config: Config) -> list[Patch]:
    """Mamba-2's gated norm over each group by itself."""
    backbone = getattr(model, "language_model", model).backbone
    return _grouped([layer.mixer for layer in backbone.layers], int(config["n_groups"]))


def grouped_falcon_h1(model: Any, config: Config) -> list[Patch]:
    """Falcon-H1's gated norm over each group by itself."""
    layers = getattr(model, "language_model", model).model.layers
    if not config["mamba_rms_norm"]:
        return []
    before = bool(config["mamba_norm_before_gate"])
    groups = int(config["mamba_n_groups"])
    return _grouped([layer.mamba for layer in layers], groups, before_gate=before)


def _grouped(mixers: list[Any], groups: int, *, before_gate: bool = False) -> list[Patch]:
    return [(mixer, "norm", _by_group(mixer.norm, groups, before_gate)) for mixer in mixers]


def _by_group(norm: Any, groups: int, before_gate: bool) -> Callable[..., Any]:
    mx: Any = import_module("mlx.core")
    nn: Any = import_module("mlx.nn")
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def normed(x: Any) -> Any:
        parts = x.reshape(*x.shape[:-1], groups, -1)
        return mx.fast.rms_norm(parts, None, epsilon).reshape(x.shape) * norm.weight

    def call(x: Any, gate: Any) -> Any:
        return normed(x) * nn.silu(gate) if before_gate else normed(x * nn.silu(gate))

    return call


class _Scaled:
    """An embedding table whose rows come out scaled; as an output projection it is unscaled."""

    def __init__(self, table: Any, scale: float) -> None:
        self.as_linear = table.as_linear
        self._table, self._scale = table, scale

    def __call__(self, ids: Any) -> Any:
        return self._table(ids) * self._scale


def rounded_scale(model: Any) -> list[Patch]:
    """RecurrentGemma's embedding scale, which the release rounds to bfloat16 in every precision."""
    mx: Any = import_module("mlx.core")
    stack = getattr(model, "language_model", model).model
    exact = math.sqrt(stack.embed_tokens.weight.shape[1])
    correction = float(mx.array(exact, mx.bfloat16)) / exact
    return [(stack, "embed_tokens", _Scaled(stack.embed_tokens, correction))]
