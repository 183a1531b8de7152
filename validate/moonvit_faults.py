"""Kimi K2.5's tower as the release has it, in a loaded mlx-vlm model."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import numpy as np

from validate.resampling import cubic_taps

Patch = tuple[Any, str, Any]
Config = Mapping[str, Any]
_EPS: Final = 1e-5
"""Of the tower's norms, in the reference's code."""


def moonvit(model: Any, config: Config) -> list[Patch]:
    """Positions resampled as torch does it, the tanh form of GELU, and the norms' epsilon."""
    del config
    nn: Any = import_module("mlx.nn")
    tower = model.vision_tower
    norms = [norm for block in tower.blocks for norm in (block.norm0, block.norm1)]
    return [
        (tower.patch_embed, "pos_emb", _Resampled(tower.patch_embed.pos_emb)),
        *((norm, "eps", _EPS) for norm in [*norms, tower.final_layernorm]),
        *((block.mlp, "activation_fn", nn.GELU(approx="precise")) for block in tower.blocks),
    ]


class _Resampled:
    """The table of positions, resampled to each picture's grid as torch does it."""

    def __init__(self, inner: Any) -> None:
        self.table = np.array(inner.weight)

    def __call__(self, x: Any, grid_hws: Any) -> Any:
        mx: Any = import_module("mlx.core")
        grids = [self._grid(*shape) for shape in grid_hws.tolist()]
        return x + mx.array(np.concatenate(grids))

    def _grid(self, height: int, width: int) -> Any:
        """Positions of a picture of ``height`` by ``width`` patches, [patches, size]."""
        tall, wide, size = self.table.shape
        rows, across = cubic_taps(np.arange(height), np.float32(height), tall)
        columns, down = cubic_taps(np.arange(width), np.float32(width), wide)
        narrow = np.einsum("thd,th->hd", self.table[rows].reshape(4, height, -1), across)
        narrow = narrow.reshape(height, wide, size)
        picture = np.einsum("htwd,tw->hwd", narrow[:, columns], down)
        return picture.reshape(height * width, size).astype(np.float32)
