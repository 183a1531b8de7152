"""The packed part of a cache: grows in steps, is cut without copying, and is read in slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from quant.kv.codec import Codec, Packed

if TYPE_CHECKING:
    import mlx.core as mx

_STEP: Final = 256
_AT_ONCE: Final = 1 << 19
"""Numbers that are encoded at once: what is computed of them on the way stays in the caches."""
_LEAST: Final = 64


@dataclass
class Store:
    """Vectors [batch, heads, tokens, dim] of one codec."""

    codec: Codec
    arrays: Packed = ()
    """Packed arrays with room to spare along the token axis."""
    count: int = field(default=0)

    def append(self, x: mx.array) -> None:
        """Encode and keep vectors [batch, heads, tokens, dim]."""
        import mlx.core as mx

        batch, heads, tokens, dim = x.shape
        many = max(_LEAST, _AT_ONCE // (batch * heads * dim))
        stretches = [self.codec.encode(x[:, :, at : at + many]) for at in range(0, tokens, many)]
        packed = [mx.concatenate(list(parts), axis=2) for parts in zip(*stretches, strict=True)]
        end = self.count + tokens
        if not self.arrays:
            self.arrays = tuple(_room(part, end) for part in packed)
        elif end > self.arrays[0].shape[2]:
            self.arrays = tuple(
                mx.concatenate([old[:, :, : self.count], _room(new, end - self.count)], axis=2)
                for old, new in zip(self.arrays, packed, strict=True)
            )
        for kept, part in zip(self.arrays, packed, strict=True):
            kept[:, :, self.count : end] = part
        self.count = end

    def decoded(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Float32 coordinates of a range of tokens, in each of the codec's bases."""
        return self.codec.decode(tuple(part[:, :, start:end] for part in self.arrays))

    def kept(self) -> Packed:
        """The arrays without room to spare."""
        return tuple(part[:, :, : self.count] for part in self.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, without room to spare."""
        return sum(part.nbytes for part in self.kept()) if self.arrays else 0


def _room(part: mx.array, needed: int) -> mx.array:
    import mlx.core as mx

    tokens = (needed + _STEP - 1) // _STEP * _STEP
    return mx.zeros((*part.shape[:2], tokens, part.shape[3]), dtype=part.dtype)
