"""A quantized KV cache with the protocol of the stock runtimes' caches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from quant.kv.attention import Part, Plain, Stored, attend
from quant.kv.learned import Learned
from quant.kv.rotation import Rotation
from quant.kv.spec import LayerSpec
from quant.kv.store import Store
from quant.kv.turbo import KvError

if TYPE_CHECKING:
    import mlx.core as mx

AVERAGED: Final = 64
"""How many of the first encoded tokens the keys' mean is of."""
BLOCK: Final = 64
"""Tokens that leave the full-precision window together; without a window, each on its own."""
STATE: Final = 4
"""Version of what :attr:`QuantizedStateCache.state` holds."""


class QuantizedStateCache:
    """One attention layer's keys and values [batch, heads, tokens, dim].

    Tokens lie in three runs: the first few and the last few as they came, those between encoded.
    New tokens are attended to as they came and are encoded when later ones push them out of the
    window. The block that was encoded last is kept as it came as well, so that forgetting as many
    tokens leaves what there would be without them. Hand instances to ``generate`` of mlx-lm or
    mlx-vlm in place of their own caches, inside
    :func:`quant.kv.runtime.caches`. ``bits`` and ``group_size`` are what the runtimes look for to
    tell a quantized cache.
    """

    group_size = 64

    def __init__(self, spec: LayerSpec, rotations: Mapping[int, Rotation]) -> None:
        self.spec = spec
        self.rotations = rotations
        self.bits = spec.key.bits
        self.offset = 0
        self.dims = (0, 0)
        self.first: Plain | None = None
        self.last: Plain | None = None
        self.undo: Plain | None = None
        """What was encoded last, as it came."""
        self.stores: tuple[Store, Store] | None = None
        self.mean: mx.array | None = None
        self.averaged = 0
        """Tokens that the mean is of."""

    # What attention layers call

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Take new tokens; what is returned is the cache itself, for the attention to read."""
        self._settle()
        self.dims = (keys.shape[-1], values.shape[-1])
        skip = 0
        have = self.first.tokens if self.first else 0
        if have < self.spec.sinks and self.offset == have:
            skip = min(self.spec.sinks - have, keys.shape[2])
            self.first = _joined(self.first, keys[:, :, :skip], values[:, :, :skip])
        if skip < keys.shape[2]:
            self.last = _joined(self.last, keys[:, :, skip:], values[:, :, skip:])
        self.offset += keys.shape[2]
        if not self.spec.window:  # attended to as it is stored, from the first
            self._settle()
        return self, self

    def attend(self, queries: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        """Attention of [batch, heads, length, dim] over everything that is kept."""
        return attend(queries, self.parts(), scale=scale, mask=mask)

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> Any:
        """The causal mask as the runtimes ask for it; "causal" is left to the attention."""
        if window_size is None and not return_array:
            return None if length == 1 else "causal"
        import mlx.core as mx

        rows = mx.arange(self.offset, self.offset + length)[:, None]
        columns = mx.arange(self.offset + length)[None]
        mask = columns <= rows
        return mask if window_size is None else mask & (columns > rows - window_size)

    def parts(self) -> list[Part]:
        """The runs of tokens in order."""
        found: list[Part] = []
        if self.first is not None:
            found.append(self.first)
        if self.stores is not None and self.stores[0].count:
            found.append(Stored(*self.stores, self.mean))
        if self.last is not None and self.last.tokens:
            found.append(self.last)
        return found

    def _settle(self) -> None:
        """Encode what has left the window, in whole blocks."""
        over = self._due() - self.stored
        if self.last is None or over <= 0:
            return
        going = self.last.part(0, over)
        keys = going.key_array
        if self.stores is None:
            self.stores = self._new_stores()
        if self.mean is None and self.spec.subtract_mean:
            self.mean = keys[:, :, :AVERAGED].astype(_float32()).mean(axis=2, keepdims=True)
            self.averaged = min(over, AVERAGED)
        if self.mean is not None:
            keys = keys.astype(_float32()) - self.mean
        self.stores[0].append(keys)
        self.stores[1].append(going.value_array)
        self.undo = going.part(max(0, over - BLOCK), over) if self.spec.window else None
        self.last = self.last.part(over, self.last.tokens)

    def _new_stores(self) -> tuple[Store, Store]:
        key = self.spec.key.codec(self.dims[0], self.rotations[self.dims[0]])
        value = self.spec.value.codec(self.dims[1], self.rotations[self.dims[1]])
        return Store(key), Store(value)

    # What the runtimes' generation and prompt caches call

    def is_trimmable(self) -> bool:
        """Always: tokens are cut off the end, encoded or not; see :attr:`exact_trim`."""
        return True

    @property
    def exact_trim(self) -> int:
        """Tokens that :meth:`trim` forgets as if they had never been.

        With a window 64 or more, as long as as many were taken: a trim that takes the last block
        that was encoded back leaves what is in the window, until the next block is encoded. Beyond
        them what comes back into the window is there as codes only.
        """
        if self.spec.window:
            needed = self.stored - (self.undo.tokens if self.undo else 0)
            free = not needed
        else:
            needed = self.averaged if self.mean is not None else 0
            free = not self.stored
        if free:
            return self.offset
        least = self._sinks + self.spec.window + needed if needed else 0
        return self.offset - max(least, self.spec.start)

    def trim(self, count: int) -> int:
        """Forget the last ``count`` tokens; how many there were to forget."""
        count = min(count, self.offset)
        self.offset -= count
        if self.undo is not None and self._due() < self.stored:
            self._keep(self.stored - self.undo.tokens)
            run = self.last
            self.last = _joined(self.undo, run.key_array, run.value_array) if run else self.undo
            self.undo = None
        left = count
        if self.last is not None:
            cut = min(left, self.last.tokens)
            self.last = _cut(self.last, cut)
            left -= cut
        cut = min(left, self.stored)
        self._keep(self.stored - cut)
        if self.first is not None and left > cut:
            self.first = _cut(self.first, left - cut)
        return count

    @property
    def stored(self) -> int:
        """Tokens that are encoded."""
        return self.stores[0].count if self.stores else 0

    @property
    def _sinks(self) -> int:
        return self.first.tokens if self.first else 0

    def _due(self) -> int:
        """Tokens that are encoded in a cache of this length, but for those that just came."""
        if self.offset < self.spec.start:
            return 0
        block = BLOCK if self.spec.window else 1
        return max(0, self.offset - self._sinks - self.spec.window) // block * block

    def _keep(self, count: int) -> None:
        """The first ``count`` codes."""
        for store in self.stores or ():
            store.count = count
        if not count:
            self.mean = None

    # What the runtimes' batch generation calls

    @property
    def batch(self) -> int:
        """Sequences, which are equally long."""
        run = self.first or self.last
        return int(run.key_array.shape[0]) if run else 1

    def row(self, index: int) -> QuantizedStateCache:
        """A copy of one sequence."""
        made = QuantizedStateCache(self.spec, self.rotations)
        made.offset, made.dims = self.offset, self.dims
        one = slice(index, index + 1)
        made.first, made.last, made.undo = (
            Plain(run.key_array[one], run.value_array[one]) if run else None
            for run in (self.first, self.last, self.undo)
        )
        made.mean = None if self.mean is None else self.mean[one]
        made.averaged = self.averaged
        if self.stores is not None:
            made.stores = made._new_stores()
            for store, own in zip(made.stores, self.stores, strict=True):
                store.arrays = tuple(part[one] for part in own.kept())
                store.count = own.count
        return made

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """Single caches as one batch of unequal lengths."""
        from quant.kv.batch import BatchQuantizedStateCache

        return BatchQuantizedStateCache.merge(caches)

    def to_batch(self, left_padding: Sequence[int]) -> Any:
        """An empty batch of these settings, for prompts that are padded on the left."""
        from quant.kv.batch import BatchQuantizedStateCache

        if self.offset:
            raise KvError("a cache that holds tokens joins a batch by merge()")
        rows = [QuantizedStateCache(self.spec, self.rotations) for _ in left_padding]
        return BatchQuantizedStateCache(rows, [int(pad) for pad in left_padding], 0)

    def size(self) -> int:
        """Tokens."""
        return self.offset

    def empty(self) -> bool:
        """Whether no token was seen."""
        return self.offset == 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, the full-precision runs included."""
        plain = (part for part in (self.first, self.last, self.undo) if part is not None)
        total = sum(part.key_array.nbytes + part.value_array.nbytes for part in plain)
        total += sum(store.nbytes for store in self.stores or ())
        return total + (self.mean.nbytes if self.mean is not None else 0)

    @property
    def state(self) -> Any:
        """Arrays and plain values, from which :meth:`from_state` makes the cache again."""
        import mlx.core as mx

        used = {dim: r.to_json() for dim, r in self.rotations.items() if dim in self.dims}
        facts = {
            "version": STATE,
            "spec": self.spec.to_json(),
            "dims": self.dims,
            "rotations": used,
            "averaged": self.averaged,
        }
        runs = [
            [run.key_array, run.value_array] if run else None
            for run in (self.first, self.last, self.undo)
        ]
        stored = [list(store.kept()) for store in self.stores] if self.stores else None
        tensors = (self.spec.key, self.spec.value)
        bases = [mx.array(one.basis.rows) for one in tensors if one.basis]
        return [
            json.dumps(facts),
            self.offset,
            self.stored,
            *runs,
            stored,
            self.mean,
            bases or None,
        ]

    @state.setter
    def state(self, value: Any) -> None:
        facts = json.loads(value[0])
        if facts.get("version") != STATE:
            raise KvError(
                f"a saved cache of version {facts.get('version', 1)}, not {STATE}: run the prompt "
                "again and save it anew"
            )
        _, offset, count, *runs, stored, mean, arrays = value
        learned = [Learned(np.array(out)) for out in arrays or ()]
        spec = LayerSpec.from_json(facts["spec"], {one.name: one for one in learned})
        rotations = {int(dim): Rotation.from_json(r) for dim, r in facts["rotations"].items()}
        QuantizedStateCache.__init__(self, spec, rotations)
        self.offset, self.dims = int(offset), tuple(facts["dims"])
        self.first, self.last, self.undo = (Plain(*run) if run else None for run in runs)
        self.mean, self.averaged = mean, int(facts["averaged"])
        if stored:
            self.stores = self._new_stores()
            for store, arrays in zip(self.stores, stored, strict=True):
                store.arrays, store.count = tuple(arrays), int(count)

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> QuantizedStateCache:
        """Make a cache of what ``state`` gave."""
        del meta_state
        made = cls.__new__(cls)
        made.state = state
        return made

    @property
    def meta_state(self) -> str:
        """Everything is in :attr:`state`."""
        return ""


def _joined(run: Plain | None, keys: mx.array, values: mx.array) -> Plain:
    import mlx.core as mx

    if run is None or not run.tokens:
        return Plain(keys, values)
    return Plain(
        mx.concatenate([run.key_array, keys], axis=2),
        mx.concatenate([run.value_array, values], axis=2),
    )


def _cut(run: Plain, count: int) -> Plain:
    return run.part(0, run.tokens - count)


def _float32() -> Any:
    import mlx.core as mx

    return mx.float32
