"""Taking documented faults of the Gemma runtimes out of a loaded model, in memory.

Each function returns patches (module, attribute, what belongs there), given the loaded model.
"""

from importlib import import_module
from typing import Any, Final

import numpy as np

Patch = tuple[Any, str, Any]
_PICTURE, _FRAME = 1, 2
"""Token types of pictures and of the frames of films."""
_SLIDING: Final = "sliding_attention"


def windowed_pictures(model: Any) -> list[Patch]:
    """Pictures that see themselves in the sliding layers alone, and no further than the window."""
    mx: Any = import_module("mlx.core")
    stack = model.language_model.model
    if stack.config.use_bidirectional_attention != "vision":
        return []
    stock = stack._make_masks

    def masks(h: Any, cache: Any, mm_token_type_ids: Any = None) -> Any:
        plain = stock(h, cache, None)
        kinds = None if mm_token_type_ids is None else np.array(mm_token_type_ids[0])
        if kinds is None or len(kinds) != h.shape[1] or h.shape[1] == 1:
            return plain
        pictured = (kinds == _PICTURE) | (kinds == _FRAME)
        starts = pictured & ~np.concatenate([[False], pictured[:-1]])
        block = np.where(pictured, np.cumsum(starts), 0)
        back = np.arange(len(kinds))[:, None] - np.arange(len(kinds))[None, :]
        same = pictured[:, None] & (block[:, None] == block[None, :])
        near = mx.array(((back >= 0) | same) & (back < stack.window_size))
        return [
            near if layer.layer_type == _SLIDING else mask
            for layer, mask in zip(stack.layers, plain, strict=True)
        ]

    return [(stack, "_make_masks", masks)]


def summed_pixels(model: Any) -> list[Patch]:
    """The norm of a patch's raw pixels with its mean and variance in double precision."""
    mx: Any = import_module("mlx.core")
    norm = model.vision_embedder.patch_ln1
    weight, bias = (np.array(part.astype(mx.float32)) for part in (norm.weight, norm.bias))

    def exact(pixels: Any) -> Any:
        wide = np.array(pixels).astype(np.float64)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + norm.eps)
        return mx.array((centred / deviation * weight + bias).astype(np.float32))

    return [(model.vision_embedder, "patch_ln1", exact)]
