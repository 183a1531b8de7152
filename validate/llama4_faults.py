"""Llama 4's norms and activations as the release has them, in a loaded MLX model."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def text(model: Any, config: Config) -> list[Patch]:
    """Queries and keys normed with the config's epsilon, once they are rotated."""
    facts = config["text_config"]
    if not facts["use_qk_norm"]:
        return []
    patches: list[Patch] = []
    for layer in model.language_model.model.layers:
        heads = layer.self_attn
        if heads.use_rope:
            rope = _normed(heads.rope, facts["rms_norm_eps"])
            patches += [(heads, "use_qk_norm", False), (heads, "rope", rope)]
    return patches


def pictures(model: Any, config: Config) -> list[Patch]:
    """Exact GELU in the tower and its adapter, and what text needs."""
    nn: Any = import_module("mlx.nn")
    tower = model.vision_model
    blocks = [*(layer.mlp for layer in tower.model.layers), tower.vision_adapter.mlp]
    return [*text(model, config), *((block, "activation_fn", nn.GELU()) for block in blocks)]


def _normed(rope: Any, epsilon: float) -> Callable[..., Any]:
    mx: Any = import_module("mlx.core")

    def rotate(x: Any, offset: Any = 0) -> Any:
        return mx.fast.rms_norm(rope(x, offset=offset), weight=None, eps=epsilon)

    return rotate
