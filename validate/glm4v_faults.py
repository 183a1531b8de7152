"""The positions of GLM-4V's tower as the release resamples them, in a loaded mlx-vlm model."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from validate.resampling import cubic_taps

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]


def glm4v(model: Any, config: Config) -> list[Patch]:
    """Positions resampled by cubics, and the config's epsilon in the blocks' norms."""
    tower, epsilon = model.vision_tower, config["vision_config"]["rms_norm_eps"]
    norms = [norm for block in tower.blocks for norm in (block.norm1, block.norm2)]
    return [
        (tower, "embeddings", _Resampled(tower.embeddings)),
        *((norm, "eps", epsilon) for norm in norms),
    ]


class _Resampled:
    """The table of positions, sampled at each patch as torch's bicubic grid_sample does."""

    def __init__(self, inner: Any) -> None:
        self.table = np.array(inner.position_embedding.weight)

    def __call__(
        self, embeddings: Any, lengths: Any, image_shapes: Any, h_coords: Any, w_coords: Any
    ) -> Any:
        mx: Any = import_module("mlx.core")
        side = int(len(self.table) ** 0.5)
        shapes = np.repeat(np.array(image_shapes), np.array(lengths), axis=0)
        rows = cubic_taps(np.array(h_coords), shapes[:, 1], side)
        columns = cubic_taps(np.array(w_coords), shapes[:, 2], side)
        grid = self.table.reshape(side, side, -1)
        found = np.zeros((len(shapes), grid.shape[-1]), dtype=np.float32)
        for row, tall in zip(*rows, strict=True):
            for column, wide in zip(*columns, strict=True):
                found += (tall * wide)[:, None] * grid[row, column]
        return embeddings + mx.array(found)
