"""Taking faults of expert routers out of a loaded model, in memory.

Each function returns patches (module, attribute, what belongs there) for a model of either
runtime; one that needs weights which the runtime discards takes the folder of the release.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Patch = tuple[Any, str, Any]


def corrected_choice(model: Any, source: Path) -> list[Patch]:
    """ERNIE 4.5's correction of the choice of experts, which the runtimes discard."""
    found = _ending(source, "moe_statics.e_score_correction_bias")
    patches: list[Patch] = []
    for index, layer in enumerate(getattr(model, "language_model", model).model.layers):
        for name, bias in found.items():
            if f".layers.{index}." in name:
                patches.append((layer, "mlp", _corrected(layer.mlp, bias.reshape(-1))))
    return patches


def _corrected(block: Any, bias: Any) -> Callable[[Any], Any]:
    mx: Any = import_module("mlx.core")

    def call(x: Any) -> Any:
        scores = mx.softmax(block.gate(x).astype(mx.float32), axis=-1)
        chosen = mx.argpartition(scores + bias, kth=-block.k, axis=-1)[..., -block.k :]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        y = (block.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2).astype(x.dtype)
        return y if block.shared_experts is None else y + block.shared_experts(x)

    return call


def divided_by_sum(model: Any) -> list[Patch]:
    """Hunyuan's routing weights, which the runtimes do not divide by their sum."""
    layers = getattr(model, "language_model", model).model.layers
    return [(layer, "mlp", _divided(layer.mlp)) for layer in layers]


def _divided(block: Any) -> Callable[[Any], Any]:
    mx: Any = import_module("mlx.core")

    def call(x: Any) -> Any:
        scores = mx.softmax(block.gate(x), axis=-1, precise=True)
        chosen = mx.argpartition(scores, kth=-block.top_k, axis=-1)[..., -block.top_k :]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return (block.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2) + block.shared_mlp(x)

    return call


def _ending(folder: Path, leaf: str) -> dict[str, Any]:
    """The tensors of a release whose names end with ``leaf``, in float32."""
    mx: Any = import_module("mlx.core")
    return {
        name: value.astype(mx.float32)
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in mx.load(str(file)).items()
        if name.endswith(leaf)
    }
