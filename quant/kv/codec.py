"""One interface for every scheme: vectors in, packed arrays out, and back in bases of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quant.kv.basis import Basis

if TYPE_CHECKING:
    import mlx.core as mx

Packed = tuple["mx.array", ...]
"""Arrays whose leading axes are those of the vectors; only the last axis is the scheme's own."""


class Codec(Protocol):
    """How vectors of ``dim`` channels are stored."""

    @property
    def dim(self) -> int:
        """Channels of a vector."""

    @property
    def bases(self) -> tuple[Basis | None, ...]:
        """The bases in which :meth:`decode` answers; None for the vectors' own."""

    @property
    def effective_bits(self) -> float:
        """Bits per channel, scales and norms included."""

    def encode(self, x: mx.array) -> Packed:
        """Vectors [batch, heads, ..., dim] -> packed arrays [batch, heads, ..., *]."""

    def decode(self, packed: Packed) -> tuple[mx.array, ...]:
        """Packed arrays -> float32 coordinates in each basis; the vectors are their sum."""


@dataclass(frozen=True)
class FloatCodec:
    """Vectors as they are, where only the other of keys and values is quantized."""

    dim: int
    bases: tuple[Basis | None, ...] = (None,)
    effective_bits: float = 16.0

    def encode(self, x: mx.array) -> Packed:
        """The vectors."""
        return (x,)

    def decode(self, packed: Packed) -> tuple[mx.array, ...]:
        """The vectors."""
        return (packed[0],)


def restored(codec: Codec, packed: Packed) -> mx.array:
    """The vectors [..., dim] that packed arrays stand for, as attention sees them."""
    found: mx.array | None = None
    for basis, part in zip(codec.bases, codec.decode(packed), strict=True):
        plain = part if basis is None else basis.inverse(part)
        found = plain if found is None else found + plain
    assert found is not None
    return found
