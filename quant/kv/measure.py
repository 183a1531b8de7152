"""What a cache costs: a text fed through it in chunks, against the same through a float cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

Forward = Callable[[Any, list[Any]], "mx.array"]
"""(token ids [1, length], caches) -> logits [1, length, vocabulary]"""


@dataclass(frozen=True, kw_only=True)
class KvLoss:
    """KL of next-token distributions from the float cache's, in nats, over all positions."""

    kl_mean: float
    kl_p99: float
    top1: float
    """Share of positions with the same first choice."""
    ppl_ratio: float
    """Perplexity of the text over the float cache's."""
    positions: int
    tokens: int

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Baseline:
    """Log-probabilities of the float cache for one text, from ``start`` on."""

    ids: tuple[int, ...]
    chunk: int
    start: int
    pieces: tuple[Any, ...]


def forward_of(model: Any) -> Forward:
    """How a loaded model of either runtime is called with caches."""

    def forward(ids: Any, caches: list[Any]) -> Any:
        out = model(ids, cache=caches)
        return getattr(out, "logits", out)

    return forward


def baseline(
    forward: Forward, caches: list[Any], ids: Sequence[int], *, chunk: int, start: int = 0
) -> Baseline:
    """Run ``ids`` through float ``caches`` and keep what they predict from position ``start``."""
    pieces = tuple(piece for _, piece in _chunks(forward, caches, ids, chunk, start))
    return Baseline(tuple(ids), chunk, start, pieces)


def loss(forward: Forward, caches: list[Any], wanted: Baseline) -> KvLoss:
    """Run the baseline's text through other caches, and compare position by position.

    The text goes through in the same chunks, so that later chunks attend to what the caches made
    of the earlier ones: a single prefill would attend to everything as it came.
    """
    import mlx.core as mx
    import numpy as np

    kls, agree, gained = [], [], 0.0
    after = {index: token for index, token in enumerate(wanted.ids[1:])}
    found = _chunks(forward, caches, wanted.ids, wanted.chunk, wanted.start)
    for (at, other), exact in zip(found, wanted.pieces, strict=True):
        kls.append(np.array((mx.exp(exact) * (exact - other)).sum(axis=-1)))
        agree.append(np.array(exact.argmax(axis=-1) == other.argmax(axis=-1)))
        known = [(row, after[at + row]) for row in range(exact.shape[0]) if at + row in after]
        if known:
            rows, tokens = (mx.array(list(part)) for part in zip(*known, strict=True))
            gained += float((exact[rows, tokens] - other[rows, tokens]).sum())
    kl, same = np.concatenate(kls), np.concatenate(agree)
    return KvLoss(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        ppl_ratio=float(np.exp(gained / max(1, kl.size))),
        positions=int(kl.size),
        tokens=len(wanted.ids),
    )


def _chunks(forward: Forward, caches: list[Any], ids: Sequence[int], chunk: int, start: int) -> Any:
    """(position, log-probabilities [length, vocabulary] in float32) of each chunk from ``start``.

    ``start`` is rounded up to a whole chunk.
    """
    import mlx.core as mx

    for at in range(0, len(ids), chunk):
        logits = forward(mx.array([list(ids[at : at + chunk])]), caches)[0]
        if at >= start:
            logits = logits.astype(mx.float32)
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            mx.eval(logits)
            yield at, logits
        else:
            mx.eval(logits)
