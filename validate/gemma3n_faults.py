"""Taking documented faults of mlx-vlm's Gemma 3n out of a loaded model, in memory.

Each function returns patches (module, attribute, what belongs there), given the loaded model.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

Patch = tuple[Any, str, Any]


def scaled_and_placed(model: Any) -> list[Patch]:
    """Scaled embeddings in a prompt, and queries of sharing layers at their own positions."""
    mx: Any = import_module("mlx.core")
    stock = model.get_input_embeddings
    config = model.config
    scale = config.text_config.hidden_size**0.5

    def scaled(input_ids: Any = None, pixel_values: Any = None, **inputs: Any) -> Any:
        found = stock(input_ids, pixel_values, **inputs)
        # Tokens of the media come from tables of their own, which are not scaled.
        words = (input_ids < config.vision_config.vocab_offset)[..., None]
        plain = found.inputs_embeds
        found.inputs_embeds = mx.where(words, plain * scale, plain)
        return found

    attention = type(model.language_model.model.layers[0].self_attn)
    attend = attention.__call__

    def placed(self: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
        if self.is_kv_shared_layer and cache is not None:
            # The layer that it shares with has moved the cache on by these tokens already.
            cache = SimpleNamespace(state=cache.state, offset=cache.offset - x.shape[1])
        return attend(self, x, mask, cache)

    return [(model, "get_input_embeddings", scaled), (attention, "__call__", placed)]


def pictures(model: Any) -> list[Patch]:
    """The same, the tower as timm has it, and its tokens row by row, not column by column."""
    stock = model.get_image_features

    def by_rows(pixel_values: Any, tower: Any, *others: Any) -> Any:
        def turned(*inputs: Any, **settings: Any) -> Any:
            return tower(*inputs, **settings).swapaxes(1, 2)

        return stock(pixel_values, turned, *others)

    towered = _tower(model.vision_tower.timm_model)
    return [*scaled_and_placed(model), *towered, (model, "get_image_features", by_rows)]


def _tower(tower: Any) -> Iterator[Patch]:
    """The tanh form of GELU, and strided convolutions of keys and values padded behind."""
    nn: Any = import_module("mlx.nn")
    for _, module in tower.named_modules():
        if isinstance(module.get("act"), nn.GELU):
            yield module, "act", nn.GELU(approx="precise")
        if "down_conv" in module:
            yield module, "down_conv", _padded_behind(module.down_conv)


def _padded_behind(conv: Any) -> Callable[[Any], Any]:
    mx: Any = import_module("mlx.core")
    kernel, stride = conv.weight.shape[1], conv.stride[0]

    def convolved(x: Any) -> Any:
        size = x.shape[1]
        room = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides = (room // 2, room - room // 2)
        wide = mx.pad(x, [(0, 0), sides, sides, (0, 0)])
        return mx.conv2d(wide, conv.weight, stride, groups=x.shape[-1])

    return convolved
