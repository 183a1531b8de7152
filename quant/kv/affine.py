"""Affine KV codes in groups of channels, as the stock runtimes store them, or after a rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from quant.kv.basis import Basis, orthonormal
from quant.kv.codec import Packed
from quant.kv.rotation import Rotation
from quant.kv.turbo import KvError

if TYPE_CHECKING:
    import mlx.core as mx

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class AffineCodec:
    """mx.quantize in groups of ``group`` channels; scale and bias in half precision.

    ``rotation`` spreads massive channels over their group first. KvError for widths and groups
    that mx.quantize does not have, or that do not divide the head.
    """

    dim: int
    bits: int
    group: int = 64
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise KvError(f"{self.bits} bits: affine caches have {', '.join(map(str, _BITS))}")
        if self.group not in _GROUPS or self.dim % self.group:
            fit = [str(group) for group in _GROUPS if self.dim % group == 0]
            choice = f"groups of {', '.join(fit)} do" if fit else "no group does"
            raise KvError(f"groups of {self.group} do not divide {self.dim} channels; {choice}")

    @cached_property
    def bases(self) -> tuple[Basis | None, ...]:
        """The rotated basis, or the vectors' own."""
        return (None if self.rotation is None else orthonormal(self.rotation.turn),)

    @property
    def effective_bits(self) -> float:
        """Bits per channel with scale and bias."""
        return self.bits + 32 / self.group

    def encode(self, x: mx.array) -> Packed:
        """Vectors [..., dim] -> (words, scales, biases)."""
        import mlx.core as mx

        if self.rotation is not None:
            x = self.rotation.forward(x.astype(mx.float32))
        words, scales, biases = mx.quantize(
            x.astype(mx.float32), group_size=self.group, bits=self.bits
        )
        return words, scales.astype(mx.float16), biases.astype(mx.float16)

    def decode(self, packed: Packed) -> tuple[mx.array, ...]:
        """Packed arrays -> vectors [..., dim] in the rotated basis."""
        import mlx.core as mx

        words, scales, biases = packed
        found = mx.dequantize(
            words,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=self.group,
            bits=self.bits,
        )
        return (found,)
