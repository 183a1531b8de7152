"""One interface for every scheme: vectors in, packed arrays out, and back in a rotated basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from quant.kv.rotation import Rotation

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
    def rotation(self) -> Rotation | None:
        """The basis in which :meth:`decode` answers; None for the vectors' own."""

    @property
    def effective_bits(self) -> float:
        """Bits per channel, scales and norms included."""

    def encode(self, x: mx.array) -> Packed:
        """Vectors [..., dim] -> packed arrays [..., *]."""

    def decode(self, packed: Packed) -> mx.array:
        """Packed arrays -> float32 vectors [..., dim] in the rotated basis."""


@dataclass(frozen=True)
class FloatCodec:
    """Vectors as they are, where only the other of keys and values is quantized."""

    dim: int
    rotation: Rotation | None = None
    effective_bits: float = 16.0

    def encode(self, x: mx.array) -> Packed:
        """The vectors."""
        return (x,)

    def decode(self, packed: Packed) -> mx.array:
        """The vectors."""
        return packed[0]
