"""Model inputs across frameworks: torch tensors as MLX arrays, and the other way."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def to_mlx(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's inputs as MLX arrays; lists of tensors stay lists, layouts are kept."""
    import mlx.core as mx

    def array(value: Any) -> Any:
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # which numpy lacks
            value = value.float()
        return mx.array(np.asarray(value))

    return {key: _each(array, value) for key, value in inputs.items() if value is not None}


def to_torch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime's inputs as torch tensors, whole numbers as int64, grids with a frame count.

    Texts and single numbers, which the runtimes hand along, are left out.
    """
    import torch

    def tensor(value: Any) -> Any:
        made = torch.from_numpy(np.array(value))
        kept = made.is_floating_point() or made.dtype == torch.bool
        return made if kept else made.long()

    made = {
        key: _each(tensor, value)
        for key, value in inputs.items()
        if not isinstance(value, str | int | float) and getattr(value, "shape", None) != ()
    }
    if "imgs_sizes" in made:
        made = _in_patches(made)
    if "image_grid_hws" in made:
        grids = made.pop("image_grid_hws")
        made["image_grid_thw"] = torch.cat([torch.ones_like(grids[:, :1]), grids], dim=1)
    return made


def _in_patches(made: dict[str, Any]) -> dict[str, Any]:
    """Whole pictures [3, rows, columns] as transformers' omni class takes them.

    That is patches [all of them, 3 * side * side] and each picture's grid of them, of which four
    make a token. Frames stay whole.
    """
    import torch

    beside = ("num_patches", "num_tokens", "imgs_sizes")
    kept = {name: value for name, value in made.items() if name not in beside}
    if "pixel_values" not in made:
        return kept
    patches, grids = [], []
    pairs = zip(made["pixel_values"], made["num_tokens"].tolist(), strict=True)
    for picture, tokens in pairs:
        _, rows, columns = picture.shape
        side = math.isqrt(rows * columns // (4 * tokens))
        grid = (rows // side, columns // side)
        cut = picture.reshape(3, grid[0], side, grid[1], side).permute(1, 3, 0, 2, 4)
        patches.append(cut.reshape(grid[0] * grid[1], 3 * side * side))
        grids.append(grid)
    return kept | {"pixel_values": torch.cat(patches), "image_grid_hw": torch.tensor(grids)}


def _each(convert: Callable[[Any], Any], value: Any) -> Any:
    """``convert`` applied to a value, or to each array of a list of them."""
    if isinstance(value, list | tuple) and value and hasattr(value[0], "shape"):
        return [convert(item) for item in value]
    return convert(value)
