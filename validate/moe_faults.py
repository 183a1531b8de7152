"""Taking documented faults out of a loaded mixture of experts, in memory.

Each function returns patches (module, attribute, what belongs there) for a model of either
runtime.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

Patch = tuple[Any, str, Any]
LATENT_EPSILON: Final = 1e-6
ROUTING_FLOOR: Final = 1e-6
"""What LFM2 adds to the sum that it divides the chosen scores by."""


def untruncated_yarn(model: Any) -> list[Patch]:
    """YaRN's frequencies with bounds between dimensions, as ``truncate: false`` means them."""
    mx: Any = import_module("mlx.core")
    text = _text(model)
    settings, dims, base = text.args.rope_scaling, text.args.head_dim, text.args.rope_theta

    def bound(rotations: float) -> float:
        turns = settings["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return float(dims * math.log(turns) / (2 * math.log(base)))

    low, high = max(bound(settings["beta_fast"]), 0), min(bound(settings["beta_slow"]), dims - 1)
    kept = 1 - mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    stretched = settings["factor"] * plain
    frequencies = stretched * plain / (stretched * kept + plain * (1 - kept))
    return [(layer.self_attn.rope, "_freqs", frequencies) for layer in text.model.layers]


def latent_epsilon(model: Any) -> list[Patch]:
    """The latent norms' own epsilon, where the runtime takes the layers'."""
    return [
        (attention[name], "eps", LATENT_EPSILON)
        for layer in _text(model).model.layers
        for attention in (
            layer.self_attn if isinstance(layer.self_attn, list) else [layer.self_attn]
        )
        for name in ("q_a_layernorm", "kv_a_layernorm")
        if name in attention
    ]


def sigmoid_router(model: Any) -> list[Patch]:
    """LFM2's sigmoid router, whose bias chooses only, where mlx-vlm has a biased softmax."""
    text = _text(model)
    return [
        (layer, "feed_forward", _sigmoid_routed(layer.feed_forward, text.args))
        for layer in text.model.layers
        if hasattr(layer.feed_forward, "switch_mlp")
    ]


def _sigmoid_routed(block: Any, args: Any) -> Callable[[Any], Any]:
    mx: Any = import_module("mlx.core")

    def call(x: Any) -> Any:
        scores = mx.sigmoid(block.gate(x).astype(mx.float32))
        choice = scores + block.expert_bias if block.use_expert_bias else scores
        chosen = mx.argpartition(choice, kth=-block.top_k, axis=-1)[..., -block.top_k :]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if block.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + ROUTING_FLOOR)
        weights = (weights * args.routed_scaling_factor).astype(x.dtype)
        return (block.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    return call


def softmax_of_all(model: Any) -> list[Patch]:
    """Jamba's softmax over all experts, where the runtimes take it over the chosen ones."""
    return [
        (layer, "feed_forward", _softmax_routed(layer.feed_forward))
        for layer in _text(model).model.layers
        if hasattr(layer.feed_forward, "switch_mlp")
    ]


def _softmax_routed(block: Any) -> Callable[[Any], Any]:
    mx: Any = import_module("mlx.core")

    def call(x: Any) -> Any:
        scores = mx.softmax(block.router(x), axis=-1, precise=True)
        count = block.num_experts_per_tok
        chosen = mx.argpartition(scores, kth=-count, axis=-1)[..., -count:]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return (block.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    return call


def scaled_positions(model: Any) -> list[Patch]:
    """The position scaling of the config, where mlx-lm rotates by plain positions."""
    ropes: Any = import_module("mlx_lm.models.rope_utils")
    args = model.args
    patches = []
    for layer in model.model.layers:
        at, limit = layer.self_attn, args.max_position_embeddings
        rope = ropes.initialize_rope(at.rope.dims, args.rope_theta, False, args.rope_scaling, limit)
        patches.append((at, "rope", rope))
    return patches


def _text(model: Any) -> Any:
    return getattr(model, "language_model", model)


def indexed_halves(model: Any) -> list[Patch]:
    """DeepSeek V3.2's indexer rotates halves, where mlx-vlm rotates neighbours, as GLM 5's does."""
    return [
        (layer.self_attn.indexer.rope, "traditional", False) for layer in _text(model).model.layers
    ]


def partitioned_afresh(model: Any) -> list[Patch]:
    """Hy 4's choice of tokens, which mlx-vlm compiles once for the first length it meets."""
    mx: Any = import_module("mlx.core")
    module: Any = import_module("mlx_vlm.models.hy_v4.indexer")
    del model

    def uncompiled(top_k: int, masked: bool) -> Callable[..., Any]:
        def partition(q: Any, k: Any, weights: Any, mask: Any = None) -> Any:
            scores = mx.maximum(q @ k.swapaxes(-1, -2), 0) * weights.swapaxes(-1, -2)[..., None]
            scores = scores.sum(axis=1, keepdims=True)
            scores = mx.where(mask, scores, -float("inf")) if masked else scores
            return mx.argpartition(scores, kth=-top_k, axis=-1)

        return partition

    return [(module, "_partition_scores", uncompiled)]
