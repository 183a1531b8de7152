"""Taking documented faults out of a loaded text model, in memory.

Each function returns patches (module, attribute, what belongs there) for a model of either
runtime; those that need a fact that the runtime throws away take the checkpoint's config.
"""

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def exact_scale(model: Any) -> list[Patch]:
    """Gemma 3's embedding scale, which the runtimes round to bfloat16."""
    mx: Any = import_module("mlx.core")
    stack = _stack(model)
    table = stack.embed_tokens
    exact = math.sqrt(table.weight.shape[1])
    correction = exact / float(mx.array(exact, mx.bfloat16))
    return [(stack, "embed_tokens", lambda ids: table(ids) * correction)]


def rotated_part(model: Any, config: Config) -> list[Patch]:
    """The rotated fraction of each head, where the runtime rotates whole heads."""
    fraction = config["partial_rotary_factor"]
    return [
        (layer.self_attn.rope, "dims", int(layer.self_attn.rope.dims * fraction))
        for layer in _stack(model).layers
    ]


def sliding_windows(model: Any, config: Config) -> list[Patch]:
    """The windows of the layers that have one (all of them where the config lists no kinds)."""
    layers = _stack(model).layers
    kinds = config.get("layer_types") or ["sliding_attention"] * len(layers)
    return [
        (layer, "self_attn", _windowed(layer.self_attn, config["sliding_window"]))
        for layer, kind in zip(layers, kinds, strict=True)
        if kind == "sliding_attention"
    ]


def windows_everywhere(model: Any, config: Config) -> list[Patch]:
    """The window of a release that has it in every layer, if it has one."""
    window = config.get("sliding_window")
    return [] if window is None else sliding_windows(model, {"sliding_window": window})


def backwards_only(model: Any) -> list[Patch]:
    """Attention to what came before, where the runtime reads a prompt both ways."""
    return [(_stack(model).config, "use_bidirectional_attention", False)]


def tanh_gated(model: Any) -> list[Patch]:
    """GELU's tanh form in a gated MLP."""

    def call(mlp: Any) -> Callable[[Any], Any]:
        nn: Any = import_module("mlx.nn")
        return lambda x: mlp.down_proj(nn.gelu_approx(mlp.gate_proj(x)) * mlp.up_proj(x))

    return [(layer, "mlp", call(layer.mlp)) for layer in _stack(model).layers]


def tanh_plain(model: Any) -> list[Patch]:
    """GELU's tanh form in an MLP without a gate."""

    def call(mlp: Any) -> Callable[[Any], Any]:
        nn: Any = import_module("mlx.nn")
        return lambda x: mlp.c_proj(nn.gelu_approx(mlp.c_fc(x)))

    return [(layer, "mlp", call(layer.mlp)) for layer in _stack(model).layers]


def tanh_bigcode(model: Any) -> list[Patch]:
    """GELU's tanh form in GPT-BigCode."""
    nn: Any = import_module("mlx.nn")

    def call(mlp: Any) -> Callable[[Any], Any]:
        return lambda x: mlp.c_proj(nn.gelu_approx(mlp.c_fc(x)))

    stack = getattr(model, "language_model", model).transformer
    return [(layer, "mlp", call(layer.mlp)) for layer in stack.h]


def exact_neox(model: Any) -> list[Patch]:
    """Exact GELU in GPT-NeoX."""
    nn: Any = import_module("mlx.nn")

    def call(mlp: Any) -> Callable[[Any], Any]:
        return lambda x: mlp.dense_4h_to_h(nn.gelu(mlp.dense_h_to_4h(x)))

    return [(layer, "mlp", call(layer.mlp)) for layer in _stack(model).h]


def exact_modernbert(model: Any) -> list[Patch]:
    """Exact GELU in ModernBERT."""
    nn: Any = import_module("mlx.nn")
    return [(layer.mlp, "act", nn.GELU()) for layer in model.layers]


def starcoder2(model: Any, config: Config) -> list[Patch]:
    """StarCoder2's window and its activation."""
    return [*tanh_plain(model), *sliding_windows(model, config)]


def phi3(model: Any, config: Config) -> list[Patch]:
    """Phi-3's window, and LongRoPE's short factors up to the length that it was trained at."""
    patches: list[Patch] = []
    settings, trained = config["rope_scaling"], config["original_max_position_embeddings"]
    for layer in _stack(model).layers:
        rope = layer.self_attn.rope
        if settings is not None and hasattr(rope, "_freqs"):  # mlx-vlm holds both kinds apart
            patches.append((layer.self_attn, "rope", _by_length(rope, settings, trained)))
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        patches += sliding_windows(model, config)
    return patches


def _stack(model: Any) -> Any:
    return getattr(model, "language_model", model).model


def _windowed(attention: Any, window: int) -> Callable[..., Any]:
    mx: Any = import_module("mlx.core")

    def call(x: Any, mask: Any = None, cache: Any = None) -> Any:
        del mask
        start = cache.offset if cache is not None else 0
        query = mx.arange(start, start + x.shape[1])[:, None]
        key = mx.arange(start + x.shape[1])[None]
        return attention(x, (key <= query) & (key > query - window), cache)

    return call


def _by_length(rope: Any, settings: Config, trained: int) -> Callable[..., Any]:
    mx: Any = import_module("mlx.core")
    long, short = mx.array(settings["long_factor"]), mx.array(settings["short_factor"])
    base = rope._freqs / long

    def call(x: Any, offset: Any = 0) -> Any:
        factors = long if int(offset) + x.shape[-2] > trained else short
        scaled = x.at[..., : rope.dim].multiply(rope._scale)
        return mx.fast.rope(
            scaled,
            rope.dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=factors * base,
        )

    return call
