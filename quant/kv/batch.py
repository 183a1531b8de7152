"""A batch of quantized caches of unequal lengths, with the protocol of the runtimes' own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quant.kv.cache import QuantizedStateCache
from quant.kv.turbo import KvError

if TYPE_CHECKING:
    import mlx.core as mx


class BatchQuantizedStateCache:
    """Rows of one sequence each, stored and attended to apart.

    A row is what it would be alone: padding is never stored, so that nothing depends on who else
    is in the batch. Outwards it is the runtimes' BatchKVCache: columns count the padding on the
    left, and prompts padded on the right come between :meth:`prepare` and :meth:`finalize`.
    ``bits`` and ``group_size`` are what the runtimes look for to tell a quantized cache.
    """

    group_size = 64
    bits = 16

    def __init__(
        self, rows: Sequence[QuantizedStateCache], padding: Sequence[int], columns: int
    ) -> None:
        self.rows = list(rows)
        self.padding = list(padding)
        """Columns before each row's first token."""
        self.columns = columns
        self._right: list[int] | None = None
        self._due: list[int] = []
        """Tokens that each row still has in a prompt padded on the right."""

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> BatchQuantizedStateCache:
        """Copies of single caches as the rows of a batch; KvError where one is not quantized."""
        other = [type(cache).__name__ for cache in caches if not hasattr(cache, "row")]
        if other:
            raise KvError(
                f"a batch of quantized caches cannot take a {other[0]}; make the caches of every "
                "prompt with the same settings"
            )
        rows = [cache.row(index) for cache in caches for index in range(cache.batch)]
        columns = max(row.offset for row in rows)
        return cls(rows, [columns - row.offset for row in rows], columns)

    # What attention layers call

    @property
    def offset(self) -> mx.array:
        """Each row's position [batch]; negative while padding on the left is still to come."""
        import mlx.core as mx

        return mx.array([self.columns - pad for pad in self.padding])

    @property
    def left_padding(self) -> mx.array:
        """Columns before each row's first token [batch]."""
        import mlx.core as mx

        return mx.array(self.padding)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take new columns [batch, heads, length, dim]; what is returned is the cache itself."""
        length = keys.shape[2]
        for index, row in enumerate(self.rows):
            first = min(max(self.padding[index] - self.columns, 0), length)
            last = length
            if self._right is not None:
                last = min(length, first + self._due[index])
                self._due[index] -= last - first
            row.dims = (keys.shape[-1], values.shape[-1])
            if last > first:
                one = slice(index, index + 1)
                row.update_and_fetch(keys[one, :, first:last], values[one, :, first:last])
        self.columns += length
        return self, self

    def attend(self, queries: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        """Attention of [batch, heads, length, dim], each row over its own tokens.

        ``mask`` has the batch's columns. What padding gives is finite and means nothing.
        """
        import mlx.core as mx

        length = queries.shape[2]
        if isinstance(mask, str) or (mask is None and length > 1):
            mask = self._mask(length, self.columns - length)
        if mask is not None and mask.shape[-1] != self.columns:
            raise KvError(f"a mask of {mask.shape[-1]} columns for a batch of {self.columns}")
        found = []
        for index, (row, pad) in enumerate(zip(self.rows, self.padding, strict=True)):
            query = queries[index : index + 1]
            if row.empty():
                found.append(mx.zeros((*query.shape[:3], row.dims[1]), dtype=query.dtype))
                continue
            seen = mask
            if mask is not None:
                seen = mask[index : index + 1] if mask.ndim == 4 and mask.shape[0] > 1 else mask
                seen = seen[..., pad : pad + row.offset]
            found.append(row.attend(query, scale=scale, mask=seen))
        return mx.concatenate(found)

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The causal mask [batch, 1, length, columns] of the next ``length`` columns."""
        del return_array
        return self._mask(length, self.columns, window_size)

    def _mask(self, length: int, before: int, window_size: int | None = None) -> mx.array:
        import mlx.core as mx

        rows = mx.arange(before, before + length)[:, None]
        columns = mx.arange(before + length)[None]
        mask = columns <= rows
        if window_size is not None:
            mask = mask & (columns > rows - window_size)
        return mask & (columns >= self.left_padding[:, None, None, None])

    # What the runtimes' batch generation calls

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce prompts of ``lengths`` tokens that are padded, on either side."""
        if left_padding is not None:
            if self.columns:
                raise KvError("padding on the left can only be added to an empty batch")
            self.padding = [a + int(b) for a, b in zip(self.padding, left_padding, strict=True)]
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise KvError("padding on the right needs the prompts' lengths")
            self._right, self._due = [int(n) for n in right_padding], [int(n) for n in lengths]

    def finalize(self) -> None:
        """The prompts that were prepared are in: what was padded right is padded left from now."""
        if self._right is not None:
            self.padding = [a + b for a, b in zip(self.padding, self._right, strict=True)]
            self._right, self._due = None, []

    def filter(self, indices: Any) -> None:
        """Keep these rows, in this order."""
        kept = [int(i) for i in (indices.tolist() if hasattr(indices, "tolist") else indices)]
        self.rows = [self.rows[i] for i in kept]
        shift = min(self.padding[i] for i in kept)
        self.padding = [self.padding[i] - shift for i in kept]
        self.columns -= shift

    def extend(self, other: Any) -> None:
        """Take the rows of another batch; KvError where that is none of quantized caches."""
        if not isinstance(other, BatchQuantizedStateCache):
            other = self.merge([other])
        columns = max(self.columns, other.columns)
        self.padding = [
            pad + columns - batch.columns for batch in (self, other) for pad in batch.padding
        ]
        self.rows = [*self.rows, *other.rows]
        self.columns = columns

    def extract(self, index: int) -> QuantizedStateCache:
        """A copy of one row, to go on alone."""
        return self.rows[index].row(0)

    def is_trimmable(self) -> bool:
        """Always."""
        return True

    def trim(self, count: int) -> int:
        """Forget the last ``count`` columns; how many there were to forget."""
        count = min(count, self.columns)
        self.columns -= count
        for row in self.rows:
            row.trim(count)
        self.padding = [min(pad, self.columns) for pad in self.padding]
        return count

    def size(self) -> int:
        """Columns."""
        return self.columns

    def empty(self) -> bool:
        """Whether no column was seen."""
        return self.columns == 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(row.nbytes for row in self.rows)

    @property
    def state(self) -> Any:
        """Arrays and plain values, from which :meth:`from_state` makes the batch again."""
        about = json.dumps({"padding": self.padding, "columns": self.columns})
        return [about, [row.state for row in self.rows]]

    @state.setter
    def state(self, value: Any) -> None:
        about, rows = value
        facts = json.loads(about)
        made = [QuantizedStateCache.from_state(row) for row in rows]
        BatchQuantizedStateCache.__init__(self, made, facts["padding"], int(facts["columns"]))

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> BatchQuantizedStateCache:
        """Make a batch of what ``state`` gave."""
        del meta_state
        made = cls.__new__(cls)
        made.state = state
        return made

    @property
    def meta_state(self) -> str:
        """Everything is in :attr:`state`."""
        return ""
