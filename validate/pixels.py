"""Compare what two image processors made of one picture, across the layouts they use."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.metrics import relative_error

Pixels = list[NDArray[np.float32]]


def leaves(value: Any) -> Pixels:
    """The arrays inside nested lists, tuples, torch or MLX arrays, without leading axes of 1."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    detach = getattr(value, "detach", None)
    array = np.array(detach().float().numpy() if detach else value, dtype=np.float32)
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    return [array]


def compare_pixels(reference: Any, other: Any) -> tuple[float, str]:
    """Relative error and the layout it was found in; infinity when no layout fits the shapes."""
    a, b = leaves(reference), leaves(other)
    errors: dict[str, float] = {}
    for layout, arrange in _LAYOUTS.items():
        x, y = arrange(a), arrange(b)
        if [i.shape for i in x] == [i.shape for i in y]:
            return relative_error(_flat(x), _flat(y)), layout
    for layout, arrange in _MOVES.items():
        y = arrange(b)
        if [i.shape for i in a] == [i.shape for i in y]:
            return relative_error(_flat(a), _flat(y)), layout
    for layout, axes in _CUTS.items():
        cut = [_patches(x, y, axes) for x, y in zip(a, b, strict=False)]
        if len(a) == len(b) and [i.shape for i in a] == [i.shape for i in cut]:
            errors[layout] = relative_error(_flat(a), _flat(cut))
    if errors:  # both have the same shape
        best = min(errors, key=lambda layout: errors[layout])
        return errors[best], best
    shapes = f"{[list(i.shape) for i in a]} against {[list(i.shape) for i in b]}"
    return float("inf"), f"no common layout: {shapes}"


def _flat(arrays: Pixels) -> NDArray[np.float32]:
    return np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(0, "f4")


def _patches(
    reference: NDArray[np.float32], picture: NDArray[np.float32], axes: tuple[int, ...]
) -> NDArray[np.float32]:
    """The picture [channels, height, width] cut into the reference's patches, padded with zeros.

    ``axes`` orders channels, rows, a patch's rows, columns and a patch's columns.
    """
    if picture.ndim != 3 or reference.ndim < 2:
        return picture
    channels, height, width = picture.shape
    side = math.isqrt(reference.shape[-1] // channels)
    rows, columns = height // max(side, 1), width // max(side, 1)
    room = reference.size // reference.shape[-1] - rows * columns
    if (rows * side, columns * side) != (height, width) or room < 0:
        return picture
    tiles = picture.reshape(channels, rows, side, columns, side).transpose(axes)
    flat = np.pad(tiles.reshape(rows * columns, -1), ((0, room), (0, 0)))
    return flat.reshape(reference.shape) if flat.size == reference.size else picture


def _joined(arrays: Pixels) -> Pixels:
    """Patches packed side by side: one array per picture, or one for all."""
    try:
        return [np.concatenate(arrays, axis=-1)] if arrays else []
    except ValueError:
        return arrays


_LAYOUTS: dict[str, Callable[[Pixels], Pixels]] = {"as is": lambda x: x, "packed": _joined}
_CUTS = {
    "cut into patches": (1, 3, 2, 4, 0),
    "cut into patches, channel by channel": (1, 3, 0, 2, 4),
}
_MOVES: dict[str, Callable[[Pixels], Pixels]] = {
    "channels last": lambda arrays: [np.moveaxis(i, -1, max(0, i.ndim - 3)) for i in arrays]
}
