"""Building tensor expressions in their shortest form: nested moves fold, empty ones vanish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from arch_maps.ops import Affine, Concat, Constant, Expr, Permute, Reshape, Shape, Slice, Stack

_MANY: Final = 64
"""Pieces beyond which a reordering is no rule that anyone would write."""


def permute(x: Expr, axes: tuple[int, ...]) -> Expr:
    """``Permute``, with nested ones composed and the identity left out."""
    if isinstance(x, Constant):
        return Constant(tuple(x.shape[axis] for axis in axes), x.value)
    if isinstance(x, Affine):
        return Affine(permute(x.x, axes), x.scale, x.offset)
    if isinstance(x, Permute):
        axes, x = tuple(x.axes[axis] for axis in axes), x.x
    return x if axes == tuple(range(len(axes))) else Permute(x, axes)


def reshape(x: Expr, shape: Shape) -> Expr:
    """``Reshape``, with nested ones composed and the identity left out."""
    if isinstance(x, Constant):
        return Constant(shape, x.value)
    if isinstance(x, Affine):
        return Affine(reshape(x.x, shape), x.scale, x.offset)
    if isinstance(x, Reshape):
        return reshape(x.x, shape)
    if x.shape == shape:
        return x
    found = _undo_join(x, shape)
    return Reshape(x, shape) if found is None else found


def slice_axis(x: Expr, axis: int, start: int, stop: int) -> Expr:
    """``Slice``, through joins where it takes whole parts."""
    size = x.shape[axis]
    if (start, stop) == (0, size):
        return x
    if isinstance(x, Constant):
        return Constant((*x.shape[:axis], stop - start, *x.shape[axis + 1 :]), x.value)
    if isinstance(x, Affine):
        return Affine(slice_axis(x.x, axis, start, stop), x.scale, x.offset)
    if isinstance(x, Slice) and x.axis == axis:
        return slice_axis(x.x, axis, x.start + start, x.start + stop)
    if isinstance(x, Stack) and x.axis == axis:
        parts = x.parts[start:stop]
        if len(parts) == 1:
            return reshape(parts[0], (*x.shape[:axis], 1, *x.shape[axis + 1 :]))
        return Stack(parts, axis)
    if isinstance(x, Concat) and x.axis == axis:
        inside = [part for part, low, high in x.spans() if low >= start and high <= stop]
        if sum(part.shape[axis] for part in inside) == stop - start:
            return concat(inside, axis)
    return Slice(x, axis, start, stop)


def concat(parts: Sequence[Expr], axis: int) -> Expr:
    """``Concat`` or ``Stack``; neighbouring slices of one tensor become one slice again."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Constant) for part in parts):
        values = {part.value for part in parts if isinstance(part, Constant)}
        if len(values) == 1:
            total = sum(part.shape[axis] for part in parts)
            shape = parts[0].shape
            return Constant((*shape[:axis], total, *shape[axis + 1 :]), values.pop())
    if all(isinstance(part, Affine) for part in parts):
        inner = [part for part in parts if isinstance(part, Affine)]
        if len({(part.scale, part.offset) for part in inner}) == 1:
            joined = concat([part.x for part in inner], axis)
            return Affine(joined, inner[0].scale, inner[0].offset)
    lifted = [_lifted(part, axis) for part in parts]
    if all(part is not None for part in lifted):
        return Stack(tuple(part for part in lifted if part is not None), axis)
    merged: list[Expr] = []
    for part in parts:
        before = merged[-1] if merged else None
        if (
            isinstance(before, Slice)
            and isinstance(part, Slice)
            and (before.axis, before.x, before.stop) == (part.axis, part.x, part.start)
            and part.axis == axis
        ):
            merged[-1] = slice_axis(part.x, axis, before.start, part.stop)
        else:
            merged.append(part)
    return merged[0] if len(merged) == 1 else Concat(tuple(merged), axis)


def spread(x: Expr, shape: Shape) -> Expr | None:
    """``x`` broadcast to ``shape`` by repeating it; None where that takes many copies."""
    if isinstance(x, Constant):
        return Constant(shape, x.value)
    x = reshape(x, (1,) * (len(shape) - len(x.shape)) + x.shape)
    for axis, size in enumerate(shape):
        if x.shape[axis] == size:
            continue
        if size > _MANY:
            return None
        x = concat([x] * size, axis)
    return x


def take(x: Expr, axis: int, indices: Sequence[int]) -> Expr | None:
    """``numpy.take`` as a reshape or as a few slices; None where neither can say it."""
    size = x.shape[axis]
    for count in _factors(size):
        rows = size // count  # every count-th element, from one of the first ones
        first = indices[0] if indices else 0
        if list(indices) == list(range(first, size, count)) and first < count < size:
            split = reshape(x, (*x.shape[:axis], rows, count, *x.shape[axis + 1 :]))
            one = slice_axis(split, axis + 1, first, first + 1)
            return reshape(one, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))
    shuffled = _shuffle(x, axis, indices)
    if shuffled is not None:
        return shuffled
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    if not 0 < len(runs) <= _MANY:
        return None
    return concat([slice_axis(x, axis, low, high) for low, high in runs], axis)


def _shuffle(x: Expr, axis: int, indices: Sequence[int]) -> Expr | None:
    """Blocks of ``inner * outer`` elements, each transposed: what interleaving amounts to."""
    size = x.shape[axis]
    if sorted(indices) != list(range(size)) or list(indices) == list(range(size)):
        return None
    for block in _factors(size):
        for inner in _factors(block):
            outer = block // inner
            if inner == 1 or outer == 1:
                continue
            wanted = [
                start + column * inner + row
                for start in range(0, size, block)
                for row in range(inner)
                for column in range(outer)
            ]
            if wanted == list(indices):
                before, after = x.shape[:axis], x.shape[axis + 1 :]
                split = reshape(x, (*before, size // block, outer, inner, *after))
                axes = list(range(len(split.shape)))
                axes[axis + 1], axes[axis + 2] = axes[axis + 2], axes[axis + 1]
                return reshape(permute(split, tuple(axes)), x.shape)
    return None


def _factors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0] + (
        [number] if number > 4096 else []
    )


def _lifted(part: Expr, axis: int) -> Expr | None:
    """What a part of one row along ``axis`` was before it got that axis, to be joined along it."""
    if not isinstance(part, Reshape) or part.shape[axis] != 1:
        return None
    inner = (*part.shape[:axis], *part.shape[axis + 1 :])
    return part.x if part.x.shape == inner else None


def _undo_join(x: Expr, shape: Shape) -> Expr | None:
    """A stack whose new axis is flattened into the next one, as the concat that it is."""
    if not isinstance(x, Stack) or x.axis == len(x.shape) - 1:
        return None
    below = x.parts[0].shape
    joined = (*below[: x.axis], len(x.parts) * below[x.axis], *below[x.axis + 1 :])
    return Concat(x.parts, x.axis) if joined == shape else None
