"""What a cache costs: a text fed through it, against the same text through a float cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mlx.core as mx

LEAD: Final = 512
"""Tokens that go through at once where nothing is measured."""

Forward = Callable[[Any, list[Any]], "mx.array"]
"""(token ids [1, length], caches) -> logits [1, length, vocabulary]"""


@dataclass(frozen=True, kw_only=True)
class KvLoss:
    """KL of next-token distributions from the float cache's, in nats, over some positions."""

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
    """Log-probabilities of the float cache for one text, from token ``start`` on.

    The text is a prompt taken in pieces of ``chunk`` tokens, and ``steps`` tokens after it that are
    decoded one by one.
    """

    ids: tuple[int, ...]
    chunk: int
    start: int
    steps: int
    rows: Any
    """[len(ids) - start, vocabulary], float32."""


def forward_of(model: Any) -> Forward:
    """How a loaded model of either runtime is called with caches."""

    def forward(ids: Any, caches: list[Any]) -> Any:
        # Qwen2-VL's kin keep the positions of the prompt before; programs renew them elsewhere.
        if getattr(model, "_position_ids", None) is not None:
            model._position_ids = None
        out = model(ids, cache=caches)
        return getattr(out, "logits", out)

    return forward


def baseline(
    forward: Forward,
    caches: list[Any],
    ids: Sequence[int],
    *,
    chunk: int,
    start: int = 0,
    steps: int = 0,
) -> Baseline:
    """Run ``ids`` through float ``caches`` and keep what they predict from token ``start`` on."""
    import mlx.core as mx

    found = [rows[0] for _, rows in _pieces(forward, caches, ids, spans(len(ids), chunk, start, 0))]
    return Baseline(tuple(ids), chunk, start, steps, mx.concatenate(found))


def loss(forward: Forward, caches: list[Any], wanted: Baseline) -> dict[str, KvLoss]:
    """Run the baseline's text through other caches: the loss of "prefill" and of "decode".

    The prompt goes through in pieces, so that each attends to what the caches made of those before
    it; what follows goes through token by token, which takes another way through the attention
    layers of some runtimes. Either is absent where the baseline has none of it.
    """
    return rowwise(forward, caches, wanted, 1)[0]


def rowwise(
    forward: Forward, caches: list[Any], wanted: Baseline, batch: int
) -> list[dict[str, KvLoss]]:
    """:func:`loss` of ``batch`` copies of the text, whose caches may differ row by row."""
    total = len(wanted.ids)
    return [
        {part: found.loss(total) for part, found in tally.items()}
        for tally in _tallies(forward, caches, wanted, batch)
    ]


def by_position(
    forward: Forward, caches: list[Any], wanted: Baseline
) -> dict[str, NDArray[np.float32]]:
    """The KL of each position, of which :func:`loss` gives the mean."""
    tally = _tallies(forward, caches, wanted, 1)[0]
    return {part: found.each() for part, found in tally.items()}


def _tallies(
    forward: Forward, caches: list[Any], wanted: Baseline, batch: int
) -> list[dict[str, _Tally]]:
    """By row, then by part, where there is any."""
    tallies = [{"prefill": _Tally(), "decode": _Tally()} for _ in range(batch)]
    total = len(wanted.ids)
    plan = spans(total, wanted.chunk, wanted.start, wanted.steps)
    for at, rows in _pieces(forward, caches, wanted.ids, plan, batch):
        end = at + rows.shape[1]
        exact = wanted.rows[at - wanted.start : end - wanted.start]
        part = "prefill" if at < total - wanted.steps else "decode"
        for tally, row in zip(tallies, rows, strict=True):
            tally[part].add(exact, row, wanted.ids[at + 1 : end + 1])
    return [{part: found for part, found in tally.items() if found.kl} for tally in tallies]


@dataclass
class _Tally:
    kl: list[Any] = field(default_factory=list)
    same: list[Any] = field(default_factory=list)
    gained: float = 0.0

    def add(self, exact: Any, other: Any, following: Sequence[int]) -> None:
        """Rows [length, vocabulary] of both; ``following`` are the tokens that came."""
        import mlx.core as mx

        self.kl.append(np.array((mx.exp(exact) * (exact - other)).sum(axis=-1)))
        self.same.append(np.array(exact.argmax(axis=-1) == other.argmax(axis=-1)))
        if following:
            rows, tokens = mx.arange(len(following)), mx.array(list(following))
            self.gained += float((exact[rows, tokens] - other[rows, tokens]).sum())

    def each(self) -> NDArray[np.float32]:
        """The KL by position."""
        return np.concatenate(self.kl)

    def loss(self, tokens: int) -> KvLoss:
        """Everything together."""
        kl, same = self.each(), np.concatenate(self.same)
        return KvLoss(
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1=float(same.mean()),
            ppl_ratio=float(np.exp(self.gained / kl.size)),
            positions=int(kl.size),
            tokens=tokens,
        )


def spans(total: int, chunk: int, start: int, steps: int) -> list[tuple[int, int, bool]]:
    """(first token, one past the last, measured) of each piece that a text is taken in."""
    prompt = total - steps
    cuts = [*range(0, start, LEAD), *range(start, prompt, chunk), *range(prompt, total)]
    ends = [*cuts[1:], total]
    return [(low, high, low >= start) for low, high in zip(cuts, ends, strict=True)]


def _pieces(
    forward: Forward,
    caches: list[Any],
    ids: Sequence[int],
    plan: Sequence[tuple[int, int, bool]],
    batch: int = 1,
) -> Iterator[tuple[int, Any]]:
    """(first token, log-probabilities [batch, length, vocabulary] in float32), where measured."""
    import mlx.core as mx

    for low, high, measured in plan:
        logits = forward(mx.array([list(ids[low:high])] * batch), caches)
        if not measured:  # what the caches hold needs no output projection
            mx.eval([cache.state for cache in caches if not cache.empty()])
            continue
        logits = logits.astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logits)
        yield low, logits
