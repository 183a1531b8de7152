"""Taking documented faults of mlx-vlm's Gemma 3n out of a loaded model, in memory.

Each function returns patches (module, attribute, what belongs there), given the loaded model.
"""

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
    """The same, and a picture's tokens row by row, where the tower has them column by column."""
    stock = model.get_image_features

    def by_rows(pixel_values: Any, tower: Any, *others: Any) -> Any:
        def turned(*inputs: Any, **settings: Any) -> Any:
            return tower(*inputs, **settings).swapaxes(1, 2)

        return stock(pixel_values, turned, *others)

    return [*scaled_and_placed(model), (model, "get_image_features", by_rows)]
