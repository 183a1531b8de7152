"""Attention over a cache that is unpacked a stretch at a time, never as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Final, Protocol

from quant.kv.basis import Basis
from quant.kv.store import Store

if TYPE_CHECKING:
    import mlx.core as mx

CHUNK: Final = 2048
"""Tokens that are unpacked at once, or more of few and small heads."""
_NUMBERS: Final = 1 << 19
"""As many numbers are unpacked at once at least: fewer take longer to start than to do."""
_HELD: Final = 1 << 24
"""About so many numbers are held at once at most. A long prompt goes through in runs of its
queries, each of which unpacks what is stored anew, which is little beside its products."""


Bases = tuple[Basis | None, ...]


class Part(Protocol):
    """A run of tokens with keys and values, as coordinates in bases of their own."""

    @property
    def tokens(self) -> int:
        """How many."""

    @property
    def key_bases(self) -> Bases:
        """The keys' bases; None for their own."""

    @property
    def value_bases(self) -> Bases:
        """The values' bases."""

    def keys(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Keys [batch, heads, end - start, *] in each basis."""

    def values(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Values [batch, heads, end - start, *] in each basis."""


@dataclass(frozen=True)
class Plain:
    """Tokens in full precision."""

    key_array: mx.array
    value_array: mx.array
    key_bases: Bases = (None,)
    value_bases: Bases = (None,)

    @property
    def tokens(self) -> int:
        """How many."""
        return int(self.key_array.shape[2])

    def keys(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Keys as they were given."""
        return (self.key_array[:, :, start:end],)

    def values(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Values as they were given."""
        return (self.value_array[:, :, start:end],)

    def part(self, start: int, end: int) -> Plain:
        """A range of the tokens."""
        return Plain(self.key_array[:, :, start:end], self.value_array[:, :, start:end])


@dataclass(frozen=True)
class Stored:
    """Packed tokens; ``mean`` [batch, heads, 1, dim] was taken off the keys."""

    key_store: Store
    value_store: Store
    mean: mx.array | None = None

    @property
    def tokens(self) -> int:
        """How many."""
        return self.key_store.count

    @property
    def key_bases(self) -> Bases:
        """The keys' bases."""
        return self.key_store.codec.bases

    @property
    def value_bases(self) -> Bases:
        """The values' bases."""
        return self.value_store.codec.bases

    def keys(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Keys, less the mean, in their bases."""
        return self.key_store.decoded(start, end)

    def values(self, start: int, end: int) -> tuple[mx.array, ...]:
        """Values in their bases."""
        return self.value_store.decoded(start, end)


def attend(queries: mx.array, parts: Sequence[Part], *, scale: float, mask: Any = None) -> mx.array:
    """softmax(scale * q k^T + mask) v over all parts in order, [batch, heads, length, dim].

    ``mask``: None, "causal" (the queries are the last tokens), or an array that broadcasts to
    [batch, heads, length, tokens], boolean (True attends) or added to the scores. Queries go into
    the keys' bases once and results out of the values' once, so that packed tokens are never
    rotated, and scores of several bases add up. They are accumulated in float32 by the online
    softmax (arXiv 1805.02867).
    """
    import mlx.core as mx

    batch, heads, length, dim = queries.shape
    total = sum(part.tokens for part in parts)
    many = max(CHUNK, _NUMBERS // (batch * parts[0].keys(0, 1)[0].shape[1] * dim))
    run = max(1, _HELD // (batch * heads * min(many, total)))
    found = []
    for at in range(0, length, run):
        some, rows = queries[:, :, at : at + run], mask
        if mask is not None and not isinstance(mask, str) and mask.shape[-2] > 1:
            rows = mask[..., at : at + run, :]
        found.append(_attended(some, parts, scale, rows, total - length + at, many))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def _attended(
    queries: mx.array, parts: Sequence[Part], scale: float, mask: Any, first: int, many: int
) -> mx.array:
    """:func:`attend` of queries of which the first is token ``first``, ``many`` tokens a time."""
    import mlx.core as mx

    batch, heads, length, dim = queries.shape
    kv_heads = parts[0].keys(0, 1)[0].shape[1]
    # The queries of a group of heads read the same keys: they are rows of one product.
    rows = (queries.astype(mx.float32) * scale).reshape(batch, kv_heads, -1, dim)
    state = _Softmax()
    at = held = 0
    for part in parts:
        along = [basis.dual(rows) if basis else rows for basis in part.key_bases]
        mean = getattr(part, "mean", None)
        offset = None if mean is None else rows @ mean.swapaxes(-1, -2)
        # Of a causal mask what comes after the last query is seen by none.
        last = min(part.tokens, first + length - at) if isinstance(mask, str) else part.tokens
        for start in range(0, last, many):
            end = min(start + many, last)
            scores = reduce(add, map(_products, along, part.keys(start, end)))
            if offset is not None:
                scores = scores + offset
            scores = _masked(scores, mask, at + start, at + end, length, first)
            state.add(scores, part.values(start, end), part.value_bases)
            held += scores.size + (end - start) * kv_heads * dim * 2
            if held > _HELD:  # what is not computed yet holds all that it needs
                state.settle()
                held = 0
        at += part.tokens
    result: mx.array = state.result().reshape(batch, heads, length, -1)
    return result.astype(queries.dtype)


def _products(queries: mx.array, keys: mx.array) -> Any:
    """Inner products [batch, heads, rows, tokens] of coordinates in one basis."""
    import mlx.core as mx

    return queries @ keys.astype(mx.float32).swapaxes(-1, -2)


class _Softmax:
    """Weighted sums of values by basis, rescaled when a larger score comes."""

    def __init__(self) -> None:
        self.top: Any = None
        self.total: Any = None
        self.sums: dict[int, tuple[Basis | None, Any]] = {}

    def add(self, scores: mx.array, values: Sequence[mx.array], bases: Bases) -> None:
        import mlx.core as mx

        top = scores.max(axis=-1, keepdims=True)
        top = top if self.top is None else mx.maximum(self.top, top)
        # A row may have no token to attend to in what has come so far.
        floor = mx.maximum(top, -1e30)
        weights = mx.exp(scores - floor)
        mass = weights.sum(axis=-1, keepdims=True)
        if self.top is not None:
            shrink = mx.exp(mx.maximum(self.top, -1e30) - floor)
            mass = mass + self.total * shrink
            self.sums = {key: (b, value * shrink) for key, (b, value) in self.sums.items()}
        self.top, self.total = top, mass
        for basis, part in zip(bases, values, strict=True):
            found = weights @ part.astype(mx.float32)
            kept = self.sums.get(id(basis))
            self.sums[id(basis)] = (basis, found if kept is None else kept[1] + found)

    def settle(self) -> None:
        """Compute what was added."""
        import mlx.core as mx

        mx.eval(self.top, self.total, [value for _, value in self.sums.values()])

    def result(self) -> Any:
        import mlx.core as mx

        total: Any = None
        for basis, value in self.sums.values():
            plain = basis.inverse(value) if basis else value
            total = plain if total is None else total + plain
        # A query may attend to nothing (padding in a batch): zero, so that nothing spreads.
        return total / mx.maximum(self.total, 1e-30)


def _masked(scores: mx.array, mask: Any, start: int, end: int, length: int, first: int) -> mx.array:
    import mlx.core as mx

    if mask is None or (isinstance(mask, str) and end <= first + 1):
        return scores
    split = scores.reshape(*scores.shape[:2], -1, length, scores.shape[-1])
    if isinstance(mask, str):
        rows = mx.arange(first, first + length)[:, None]
        return mx.where(mx.arange(start, end)[None] <= rows, split, -mx.inf).reshape(scores.shape)
    piece: mx.array = mask[..., start:end]
    if piece.ndim == 4 and piece.shape[1] > 1:  # one for each query head
        piece = piece.reshape(piece.shape[0], scores.shape[1], -1, *piece.shape[2:])
    elif piece.ndim == 4:
        piece = piece[:, :, None]
    if piece.dtype == mx.bool_:
        return mx.where(piece, split, -mx.inf).reshape(scores.shape)
    return (split + piece.astype(mx.float32)).reshape(scores.shape)
