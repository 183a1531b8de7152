"""How far two sets of logits are apart: pure numpy, no runtime.

Every figure is computed in float64. A NaN or an infinity that the other side does not share counts
as an infinite error, so it can never pass a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_BLOCK = 1 << 22  # elements held in float64 at once


@dataclass(frozen=True)
class LogitComparison:
    """Distances of one prompt's logits from the reference, one entry per position."""

    scale: float
    """max |reference logit| over all positions."""
    error: Array
    """[positions] max |difference|."""
    squared: Array
    """[positions] mean squared difference."""
    kl: Array
    """[positions] KL(reference || other) of the softmaxes, in nats."""
    agree: NDArray[np.bool_]
    """[positions] whether both sides rank the same token first."""

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of any logit."""
        return float(self.error.max(initial=0.0))

    @property
    def relative(self) -> float:
        """max |difference| / max |reference|; infinite when anything is not finite."""
        return relative(self.max_abs, self.scale)


def relative(difference: float, scale: float) -> float:
    """``difference / scale``, where 0/0 is 0 and x/0 or anything non-finite is infinity."""
    if not np.isfinite(difference) or not np.isfinite(scale):
        return float("inf")
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def relative_error(reference: ArrayLike, other: ArrayLike) -> float:
    """max |other - reference| / max |reference| of two arrays of one shape."""
    a, b = _pair(reference, other)
    return relative(float(_distance(a, b).max(initial=0.0)), _scale(a))


def max_abs_difference(reference: ArrayLike, other: ArrayLike) -> float:
    """max |other - reference|; infinite when a value is not finite on one side only."""
    a, b = _pair(reference, other)
    return float(_distance(a, b).max(initial=0.0))


def kl_divergence(reference: ArrayLike, other: ArrayLike) -> Array:
    """KL(softmax(reference) || softmax(other)) along the last axis, in nats, never below 0."""
    a, b = _pair(reference, other)
    log_p, log_q = log_softmax(a), log_softmax(b)
    with np.errstate(invalid="ignore", over="ignore"):
        terms = np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * (log_p - log_q))
        total: Array = terms.sum(axis=-1)
    return np.where(np.isfinite(total), np.maximum(total, 0.0), np.inf)


def log_softmax(logits: ArrayLike) -> Array:
    """Log-probabilities along the last axis in float64; a row with a NaN or +inf is all NaN."""
    x = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shifted = x - x.max(axis=-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def compare_logits(reference: ArrayLike, other: ArrayLike) -> LogitComparison:
    """Compare two [positions, vocabulary] arrays; ValueError when the shapes differ."""
    a, b = np.asarray(reference), np.asarray(other)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"logits of shapes {a.shape} and {b.shape} cannot be compared")
    rows = max(1, _BLOCK // max(1, a.shape[1]))
    error, squared, kl, agree = [], [], [], []
    for start in range(0, a.shape[0], rows):
        x, y = _pair(a[start : start + rows], b[start : start + rows])
        distance = _distance(x, y)
        error.append(distance.max(axis=-1))
        squared.append(np.square(distance).mean(axis=-1))
        kl.append(kl_divergence(x, y))
        agree.append(_first(x) == _first(y))
    if not error:
        empty = np.zeros(0)
        return LogitComparison(0.0, empty, empty, empty, np.zeros(0, dtype=np.bool_))
    return LogitComparison(
        scale=_scale(a),
        error=np.concatenate(error),
        squared=np.concatenate(squared),
        kl=np.concatenate(kl),
        agree=np.concatenate(agree),
    )


@dataclass(frozen=True)
class LogitSummary:
    """The figures of several prompts together."""

    relative: float
    max_abs: float
    rms: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    positions: int


def summarize(comparisons: Sequence[LogitComparison]) -> LogitSummary:
    """Worst relative and absolute error, and the KL and top-1 figures over all positions."""
    if not comparisons:
        raise ValueError("no logits to summarize")
    kl = np.concatenate([c.kl for c in comparisons])
    squared = np.concatenate([c.squared for c in comparisons])
    agree = np.concatenate([c.agree for c in comparisons])
    finite = bool(np.isfinite(kl).all())
    return LogitSummary(
        relative=max(c.relative for c in comparisons),
        max_abs=max(c.max_abs for c in comparisons),
        rms=float(np.sqrt(squared.mean())) if kl.size else 0.0,
        kl_mean=float(kl.mean()) if kl.size else 0.0,
        kl_p99=(float(np.quantile(kl, 0.99)) if finite else float("inf")) if kl.size else 0.0,
        kl_max=float(kl.max(initial=0.0)),
        top1=float(agree.mean()) if agree.size else 1.0,
        positions=int(kl.size),
    )


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int:
    """Number of leading tokens that both sequences share."""
    for index, (a, b) in enumerate(zip(reference, other, strict=False)):
        if a != b:
            return index
    return min(len(reference), len(other))


def margin(logits: ArrayLike, first: int, second: int) -> float:
    """By how much ``logits`` [vocabulary] prefers token ``first`` to token ``second``."""
    row = np.asarray(logits, dtype=np.float64)
    return float(row[first] - row[second])


def cosine(reference: ArrayLike, other: ArrayLike) -> Array:
    """Cosine similarity of the rows of two [count, size] arrays; NaN rows give NaN."""
    a, b = _pair(reference, other)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = (a * b).sum(axis=-1) / norm
    return result


def _pair(reference: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    a = np.asarray(reference, dtype=np.float64)
    b = np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape} cannot be compared")
    return a, b


def _distance(a: Array, b: Array) -> Array:
    # Equal infinities (masked vocabulary entries) are no difference; every other one is infinite.
    with np.errstate(invalid="ignore"):
        difference = np.abs(a - b)
    difference = np.where(a == b, 0.0, difference)
    return np.where(np.isnan(difference), np.inf, difference)


def _scale(a: ArrayLike) -> float:
    values = np.abs(np.asarray(a))
    if bool(np.isnan(values).any()):
        return float("nan")
    finite = values[np.isfinite(values)]
    return float(finite.max(initial=0.0))


def _first(rows: Array) -> NDArray[np.intp]:
    return np.asarray(rows.argmax(axis=-1))


def different_ids(expected: Sequence[int], got: Sequence[int]) -> int:
    """Token ids that are not in both sequences at their place, counting shifted runs once."""
    blocks = SequenceMatcher(a=expected, b=got, autojunk=False).get_matching_blocks()
    return max(len(expected), len(got)) - sum(block.size for block in blocks)
