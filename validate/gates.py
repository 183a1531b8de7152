"""Turn pairs of outputs into checks: what is measured, against which threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from validate.checks import EXACT, NOISE, CaseResult, Check, at_most
from validate.metrics import (
    LogitComparison,
    compare_logits,
    cosine,
    first_divergence,
    log_softmax,
    margin,
    relative,
    relative_error,
    summarize,
)
from validate.reference import Greedy, Logits

Pairs = Sequence[tuple[str, Logits, Logits]]
"""(prompt, reference, other)"""


def logits_check(name: str, *, modality: str, runtime: str, pairs: Pairs) -> Check:
    """max |d| / max |logit| over all prompts, gated at the float32 threshold."""
    compared = [(prompt, compared_logits(a, b)) for prompt, a, b in pairs]
    summary = summarize([c for _, c in compared])
    return Check(
        name=name,
        modality=modality,
        runtime=runtime,
        value=summary.relative,
        threshold=EXACT,
        verdict=at_most(summary.relative, EXACT),
        metrics=asdict(summary),
        cases=tuple(_case(prompt, c, c.relative) for prompt, c in compared),
    )


def loss_check(
    *,
    modality: str,
    runtime: str,
    pairs: Pairs,
    kl_threshold: float | None,
    what: str,
    statistics: Mapping[str, float] | None = None,
) -> Check:
    """KL from the original, reported; gated on its mean only when the user sets a threshold.

    ``statistics`` are further figures of the same positions.
    """
    compared = [(prompt, compared_logits(a, b)) for prompt, a, b in pairs]
    summary = summarize([c for _, c in compared])
    return Check(
        name="loss",
        modality=modality,
        runtime=runtime,
        value=summary.kl_mean,
        threshold=kl_threshold,
        verdict=at_most(summary.kl_mean, kl_threshold),
        note=what,
        metrics={**asdict(summary), **(statistics or {})},
        cases=tuple(_case(prompt, c, float(c.kl.mean())) for prompt, c in compared),
    )


def noise_check(
    *,
    modality: str,
    runtime: str,
    dtype: str,
    rows: Sequence[tuple[str, Logits, Logits, Logits]],
) -> Check:
    """RMS error of the runtime in ``dtype`` over torch's own, both against torch in float32.

    ``rows`` are (prompt, float32, torch in dtype, runtime in dtype).
    """
    torch_side = [compared_logits(exact, noisy) for _, exact, noisy, _ in rows]
    mlx_side = [compared_logits(exact, other) for _, exact, _, other in rows]
    noise, error = summarize(torch_side), summarize(mlx_side)
    value = relative(error.rms, noise.rms)
    cases = tuple(
        CaseResult(
            name=prompt,
            value=relative(summarize([m]).rms, summarize([t]).rms),
            metrics={"runtime_relative": m.relative, "torch_relative": t.relative},
        )
        for (prompt, *_), t, m in zip(rows, torch_side, mlx_side, strict=True)
    )
    return Check(
        name="noise",
        modality=modality,
        runtime=runtime,
        value=value,
        threshold=NOISE,
        verdict=at_most(value, NOISE),
        note=f"error of computing in {dtype}, in units of torch's own",
        metrics={
            "runtime_rms": error.rms,
            "torch_rms": noise.rms,
            "runtime_relative": error.relative,
            "torch_relative": noise.relative,
            "runtime_kl_mean": error.kl_mean,
            "torch_kl_mean": noise.kl_mean,
            "top1": error.top1,
        },
        cases=cases,
    )


def greedy_check(
    name: str, *, modality: str, runtime: str, rows: Sequence[tuple[str, Greedy, Logits]]
) -> Check:
    """Tokens until the runtime's greedy choice leaves the reference's.

    Leaving at a tie (both tokens within the float32 gate of each other) is no fault.
    """
    cases, failed, ties = [], False, 0
    wanted = min(len(greedy.tokens) for _, greedy, _ in rows)
    for prompt, greedy, steps in rows:
        chosen = [int(token) for token in steps.argmax(axis=-1)]
        shared = first_divergence(greedy.tokens, chosen)
        metrics: dict[str, float | int | str] = {
            "tokens": len(greedy.tokens),
            "reference": " ".join(map(str, greedy.tokens)),
        }
        if shared < len(greedy.tokens):
            row = greedy.logits[shared]
            gap = margin(row, greedy.tokens[shared], chosen[shared])
            tie = gap <= 2 * EXACT * float(np.abs(row).max())
            metrics |= {"margin": gap, "tie": int(tie)}
            ties += tie
            failed = failed or not tie
        cases.append(CaseResult(prompt, shared, metrics, {"logprob": _logprobs(greedy)}))
    return Check(
        name=name,
        modality=modality,
        runtime=runtime,
        value=min(case.value for case in cases),
        threshold=wanted,
        verdict="fail" if failed else "pass",
        note=f"{ties} prompts part at a tie" if ties else "tokens to first divergence, at least",
        cases=tuple(cases),
    )


def _logprobs(greedy: Greedy) -> list[float]:
    """What the reference gave each token of its answer, in nats."""
    rows = log_softmax(greedy.logits)
    return [float(row[token]) for row, token in zip(rows, greedy.tokens, strict=True)]


def hidden_check(*, runtime: str, pairs: Pairs) -> Check:
    """Relative error of an encoder's last hidden states."""
    cases = tuple(CaseResult(name, _relative(a, b)) for name, a, b in pairs)
    value = max(case.value for case in cases)
    return Check(
        name="hidden",
        modality="sentence",
        runtime=runtime,
        value=value,
        threshold=EXACT,
        verdict=at_most(value, EXACT),
        note="last hidden state",
        cases=cases,
    )


def embedding_check(
    name: str, *, runtime: str, pairs: Pairs, threshold: float | None, note: str
) -> Check:
    """1 - cosine of sentence embeddings with the reference's; the largest counts."""
    cases = tuple(
        CaseResult(prompt, 1.0 - float(cosine(a[None], b[None])[0])) for prompt, a, b in pairs
    )
    values = [case.value for case in cases]
    value = float("nan") if np.isnan(values).any() else max(values)
    return Check(
        name=name,
        modality="sentence",
        runtime=runtime,
        value=value,
        threshold=threshold,
        verdict=at_most(value, threshold),
        note=note,
        metrics={"mean": float(np.mean(values))},
        cases=cases,
    )


def _relative(a: Logits, b: Logits) -> float:
    return relative_error(a, b) if a.shape == b.shape else float("inf")


def compared_logits(a: Logits, b: Logits) -> LogitComparison:
    """Compare; logits of another shape count as infinitely far away."""
    if a.shape == b.shape:
        return compare_logits(a, b)
    return compare_logits(a, np.full_like(a, np.nan))


def _case(prompt: str, compared: LogitComparison, value: float) -> CaseResult:
    scale = compared.scale or 1.0
    return CaseResult(
        name=prompt,
        value=value,
        metrics={
            "relative": compared.relative,
            "max_abs": compared.max_abs,
            "kl_max": float(compared.kl.max(initial=0.0)),
            "top1": float(compared.agree.mean()) if compared.agree.size else 1.0,
            "positions": int(compared.kl.size),
        },
        series={
            "error": [float(e) / scale for e in compared.error],
            "kl": [float(k) for k in compared.kl],
        },
    )
