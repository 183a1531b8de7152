"""TurboQuant's two-stage codec for inner products, for comparison with the one-stage one.

arXiv 2504.19874, algorithm 2: one bit less of codebook, and the signs of a Gaussian projection of
what is left over (QJL, arXiv 2406.03482), which make inner products unbiased. At equal bits its
error is larger than that of the codebook alone with an unbiased norm, so no scheme offers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.kv.basis import Basis
from quant.kv.codec import Packed
from quant.kv.codes import fields, pack, pack_norms, unpack_norms
from quant.kv.rotation import Rotation
from quant.kv.turbo import KvError, TurboCodec

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, kw_only=True)
class ProdCodec:
    """``bits`` - 1 of codebook, one of signs, and two 16-bit norms per vector; 2 bits or more."""

    dim: int
    bits: int
    rotation: Rotation
    seed: int = 0
    """Of the projection, which is no part of any checkpoint."""

    def __post_init__(self) -> None:
        if self.bits < 2:
            raise KvError(f"{self.bits} bits: two stages need 2 or more")

    @cached_property
    def _first(self) -> TurboCodec:
        return TurboCodec(dim=self.dim, bits=self.bits - 1, rotation=self.rotation, norm="own")

    @cached_property
    def _projection(self) -> Any:
        import mlx.core as mx

        draw = np.random.default_rng(np.random.SeedSequence([self.seed, self.dim]))
        return mx.array(draw.standard_normal((self.dim, self.dim)).astype(np.float32))

    @property
    def bases(self) -> tuple[Basis | None, ...]:
        """The rotated basis."""
        return self._first.bases

    @property
    def effective_bits(self) -> float:
        """Bits per channel with both norms."""
        return self.bits + 32 / self.dim

    def encode(self, x: mx.array) -> Packed:
        """Vectors [..., dim] -> (codes, norms [..., 1], signs, norms of what is left [..., 1])."""
        import mlx.core as mx

        first = self._first.encode(x)
        left = self.rotation.forward(x.astype(mx.float32)) - self._first.decode(first)[0]
        signs = (left @ self._projection.T > 0).astype(mx.uint32)
        size = mx.linalg.norm(left, axis=-1, keepdims=True)
        return (*first, pack(signs, 1), pack_norms(size))

    def decode(self, packed: Packed) -> tuple[mx.array, ...]:
        """Packed arrays -> vectors [..., dim] in the rotated basis."""
        import mlx.core as mx

        first, (signs, size) = packed[:-2], packed[-2:]
        turned = (fields(signs, 1).astype(mx.float32) * 2.0 - 1.0) @ self._projection
        scale = np.sqrt(np.pi / 2.0) / self.dim
        return (self._first.decode(first)[0] + turned * (scale * unpack_norms(size)),)
