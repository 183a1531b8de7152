"""Quality of a quantized model on a text: the statistics of llama.cpp's ``llama-perplexity``.

Formulas as in tools/perplexity/perplexity.cpp of ggml-org/llama.cpp (``--kl-divergence``): tokens
of the second half of each window are scored, uncertainties are standard errors of the mean, those
of a perplexity ratio with the covariance of the two. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from validate.metrics import kl_divergence, log_softmax

Array = NDArray[np.float64]
_BLOCK: Final = 1 << 22
"""Elements held in float64 at once."""
PERCENTILES: Final = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}


@dataclass(frozen=True)
class Tokens:
    """Figures of each scored token, [tokens]."""

    base: Array
    """Negative log-likelihood under the reference, in nats."""
    nll: Array
    """The same under the model."""
    kl: Array
    """KL(reference || model) of the next-token distributions, in nats."""
    agree: NDArray[np.bool_]
    """Whether both rank the same token first."""
    moved: Array
    """Change of the probability of the token that came."""


def score(reference: ArrayLike, logits: ArrayLike, targets: ArrayLike) -> Tokens:
    """Compare logits [tokens, vocabulary] with the reference's; ``targets`` [tokens] came next."""
    a, b, ids = np.asarray(reference), np.asarray(logits), np.asarray(targets)
    rows = max(1, _BLOCK // a.shape[1])
    return joined(
        [
            _scored(a[start : start + rows], b[start : start + rows], ids[start : start + rows])
            for start in range(0, len(a), rows)
        ]
    )


def _scored(reference: ArrayLike, logits: ArrayLike, targets: NDArray[np.int64]) -> Tokens:
    ids = targets[:, None]
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    base, other = (np.take_along_axis(x, ids, axis=1)[:, 0] for x in (log_p, log_q))
    return Tokens(
        base=-base,
        nll=-other,
        kl=kl_divergence(log_p, log_q),
        agree=log_p.argmax(axis=1) == log_q.argmax(axis=1),
        moved=np.exp(other) - np.exp(base),
    )


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several windows together."""
    return Tokens(
        base=np.concatenate([p.base for p in parts]),
        nll=np.concatenate([p.nll for p in parts]),
        kl=np.concatenate([p.kl for p in parts]),
        agree=np.concatenate([p.agree for p in parts]),
        moved=np.concatenate([p.moved for p in parts]),
    )


def statistics(tokens: Tokens) -> dict[str, float]:
    """Every figure by name, ``..._error`` its standard error; ValueError for under two tokens."""
    count = len(tokens.kl)
    if count < 2:
        raise ValueError("statistics need at least two scored tokens")
    mean, base = float(tokens.nll.mean()), float(tokens.base.mean())
    covariance = np.cov(tokens.nll, tokens.base) / count  # of the two means
    log_ratio = mean - base
    log_error = float(np.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    square = np.square(tokens.moved)
    rms = float(np.sqrt(square.mean()))
    agree = float(tokens.agree.mean())
    return {
        "tokens": count,
        "perplexity": float(np.exp(mean)),
        "perplexity_error": float(np.exp(mean) * np.sqrt(covariance[0, 0])),
        "perplexity_base": float(np.exp(base)),
        "perplexity_ratio": float(np.exp(log_ratio)),
        "perplexity_ratio_error": float(np.exp(log_ratio)) * log_error,
        "kl_mean": float(tokens.kl.mean()),
        "kl_mean_error": _error(tokens.kl),
        **{name: float(np.quantile(tokens.kl, share)) for name, share in PERCENTILES.items()},
        "kl_max": float(tokens.kl.max()),
        "top1": agree,
        "top1_error": float(np.sqrt(agree * (1 - agree) / (count - 1))),
        "moved_mean": float(tokens.moved.mean()),
        "moved_rms": rms,
        "moved_rms_error": 0.5 * _error(square) / rms if rms else 0.0,
    }


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB, of two sums of squares; infinite without noise."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _error(values: Array) -> float:
    """Standard error of the mean."""
    return float(np.sqrt(values.var(ddof=1) / len(values)))
