"""Sentence encoders: hidden states and pooled embeddings instead of logits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from validate.answers import Question, text_questions
from validate.checks import EXACT, at_most
from validate.deviations import deviations_for, without
from validate.gates import embedding_check, hidden_check, noise_check
from validate.judgement import Found, Judgement, compare_tokens, load_checked
from validate.reference import Logits, ReferenceError, TorchReference, read_config
from validate.runtime import MlxRuntime, RuntimeRefusal
from validate.shown import Shown, compare_shown, show

_UNSTATED: Final = {"qwen3": "lasttoken"}
"""How mlx-vlm pools embeddings of these types where no file says how; it takes the mean else."""


@dataclass(frozen=True)
class Encoded:
    """Hidden states and embeddings of every sentence, in order."""

    hidden: tuple[Logits, ...]
    pooled: tuple[Logits, ...]


def pooling_mode(folder: Path) -> str:
    """How a sentence-transformers release pools: mean, cls, max or lasttoken.

    Without such a file, as mlx-vlm pools embeddings of this type: mean, but for a few.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return _UNSTATED.get(str(read_config(folder).get("model_type")), "mean")
    settings = json.loads(path.read_text(encoding="utf-8"))
    named = settings.get("pooling_mode")
    for mode, key in (
        ("mean", "pooling_mode_mean_tokens"),
        ("cls", "pooling_mode_cls_token"),
        ("max", "pooling_mode_max_tokens"),
        ("lasttoken", "pooling_mode_lasttoken"),
    ):
        if settings.get(key) or named == mode:
            return mode
    raise ReferenceError(f"{path}: a pooling that the runtime does not have")


def pool(hidden: Logits, mode: str) -> Logits:
    """Unit-length embedding [size] of hidden states [positions, size]."""
    vector = {
        "mean": hidden.mean(axis=0),
        "cls": hidden[0],
        "max": hidden.max(axis=0),
        "lasttoken": hidden[-1],
    }[mode]
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), dtype=np.float32)


def judge_encoder(
    job: Judgement, *, source: Path, dequantized: Path | None
) -> tuple[dict[str, Any], Found]:
    """Description of the reference, and every check of an encoder in mlx-vlm."""
    trust = job.trust_remote_code
    mode = pooling_mode(source)
    job.progress("torch: loading the reference")
    model = TorchReference.load(dequantized or source, trust_remote_code=trust)
    described: dict[str, Any] = {**model.describe(), "pooling": mode}
    if dequantized is None and not job.quantized and not model.holds_in(job.dtype):
        model.round_to(job.dtype)
        described["rounded_to"] = job.dtype
    questions = text_questions(
        source, vocab_size=model.vocab_size, files=("sentences.json",), trust_remote_code=trust
    )
    questions = [replace(one, ids=one.ids[: model.positions]) for one in questions]
    exact = _encode(model, questions, mode)
    shown = show(model, source, trust_remote_code=trust)
    original = exact
    if dequantized is not None or "rounded_to" in described:
        original = _encode(TorchReference.load(source, trust_remote_code=trust), questions, mode)
    noisy = None
    if not job.quantized and job.dtype != "float32":
        low = TorchReference.load(dequantized or source, dtype=job.dtype, trust_remote_code=trust)
        noisy = _encode(low, questions, mode)
    found = Found("mlx_vlm", description={"name": "mlx_vlm"})
    try:
        _judge(job, found, questions, exact=exact, original=original, noisy=noisy, shown=shown)
    except RuntimeRefusal as error:
        found.refused("load", "weights", error)
    return described, found


def _judge(
    job: Judgement,
    found: Found,
    questions: Sequence[Question],
    *,
    exact: Encoded,
    original: Encoded,
    noisy: Encoded | None,
    shown: Sequence[Shown],
) -> None:
    names = [question.case.name for question in questions]
    model = load_checked(job, found)
    compare_tokens(found, model, questions)
    stock = output = _run(model, questions)
    if job.exact:
        output = _without_deviations(found, model, questions, exact, stock)
        found.checks.append(
            hidden_check(
                runtime=found.runtime,
                pairs=list(zip(names, exact.hidden, output.hidden, strict=True)),
            )
        )
        found.checks.append(
            embedding_check(
                "embedding",
                runtime=found.runtime,
                pairs=list(zip(names, exact.pooled, output.pooled, strict=True)),
                threshold=EXACT,
                note="1 - cosine of the pooled sentence embeddings",
            )
        )
        found.checks += compare_shown(model, shown)
    if original is not exact or job.quantized:
        found.checks.append(
            embedding_check(
                "loss",
                runtime=found.runtime,
                pairs=list(zip(names, original.pooled, stock.pooled, strict=True)),
                threshold=None,
                note="1 - cosine of the embeddings with the original's",
            )
        )
    if noisy is not None:
        native = _run(MlxRuntime.load(job.mlx_path, runtime=found.runtime), questions)
        found.checks.append(
            noise_check(
                modality="sentence",
                runtime=found.runtime,
                dtype=job.dtype,
                rows=list(zip(names, exact.hidden, noisy.hidden, native.hidden, strict=True)),
            )
        )


def _without_deviations(
    found: Found, model: MlxRuntime, questions: Sequence[Question], exact: Encoded, stock: Encoded
) -> Encoded:
    """The stock states, or where they miss the gate, those without documented faults."""
    known = deviations_for(
        found.runtime, model_type=str(model.config.get("model_type")), modality="sentence"
    )
    names = [question.case.name for question in questions]
    pairs = list(zip(names, exact.hidden, stock.hidden, strict=True))
    check = hidden_check(runtime=found.runtime, pairs=pairs)
    if not known or check.verdict == "pass":
        return stock
    bound = max(item.bound for item in known)
    within = check.value is not None and at_most(check.value, bound) == "pass"
    note = "; ".join(item.what for item in known)
    found.checks.append(
        replace(
            check,
            name="deviation",
            threshold=bound,
            verdict="info" if within else "fail",
            note=f"{note}. The other rows are judged with this fault taken out in memory.",
        )
    )
    with without(known, model.model, model.config):
        return _run(model, questions)


def _encode(model: TorchReference, questions: Sequence[Question], mode: str) -> Encoded:
    hidden = tuple(model.hidden(question.ids) for question in questions)
    return Encoded(hidden, tuple(pool(states, mode) for states in hidden))


def _run(model: MlxRuntime, questions: Sequence[Question]) -> Encoded:
    pairs = [model.hidden(question.ids) for question in questions]
    return Encoded(tuple(h for h, _ in pairs), tuple(p for _, p in pairs))
