"""One stock runtime on one checkpoint, held against the reference's answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from validate.answers import Answer, Answers, Question
from validate.arrays import to_mlx
from validate.cases import MEDIA_FILES
from validate.checks import EXACT, CaseResult, Check, at_most
from validate.deviations import deviations_for, without
from validate.gates import greedy_check, logits_check, loss_check, noise_check
from validate.listening import audio_inputs
from validate.loaded import compare_loaded
from validate.looking import image_inputs, medium
from validate.metrics import compare_logits, different_ids
from validate.runtime import Logits, MlxRuntime, RuntimeRefusal, Steps

_PACKED_TOKENS: Final = 4
_SHOWN: Final = 8


@dataclass(frozen=True)
class Judgement:
    """What is judged and how."""

    mlx_path: Path
    source: Path
    quantized: bool
    dtype: str
    exact: bool
    kl_threshold: float | None
    progress: Callable[[str], None]
    trust_remote_code: bool
    text_only: bool
    """The checkpoint has parts that a text-only runtime leaves alone."""


@dataclass
class Found:
    """Checks and description gathered from one runtime."""

    runtime: str
    checks: list[Check] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)

    def refused(self, name: str, modality: str, error: RuntimeRefusal) -> None:
        """Record what the runtime would not do as a failed check."""
        self.checks.append(
            Check(
                name=name,
                modality=modality,
                runtime=self.runtime,
                verdict="fail",
                note=str(error),
                metrics={"needs_metal": 1} if error.needs_metal else {},
            )
        )


def judge_runtime(job: Judgement, answers: Answers, *, runtime: str) -> Found:
    """Every check of a generating model in ``runtime``."""
    found = Found(runtime, description={"name": runtime})
    try:
        model = load_checked(job, found)
    except RuntimeRefusal as error:
        found.refused("load", "weights", error)
        return found
    compare_tokens(found, model, [item.question for item in answers.exact])
    for modality, rows in _by_modality(answers).items():
        if modality in MEDIA_FILES and runtime == "mlx_lm":
            continue
        job.progress(f"{runtime}: {modality}")
        heard: list[Check] = []
        try:
            if modality == "audio":
                run = partial(_listen, model, answers, rows, heard)
            else:
                inputs, seen = (
                    image_inputs(model, answers, rows) if modality == "image" else ({}, [])
                )
                found.checks += seen
                run = partial(_run, model, answers, rows, inputs)
            stock = run()
            judged = _without_deviations(job, found, model, answers, modality, stock, run)
            found.checks += heard
            _outputs(job, found, answers, modality, judged)
            _loss(job, found, answers, modality, stock)
        except RuntimeRefusal as error:
            found.refused(f"{_prefix(modality)}logits", modality, error)
    if answers.noisy:
        _noise(job, found, answers)
    return found


def load_checked(job: Judgement, found: Found, *, sample: bool = True) -> MlxRuntime:
    """Load, compare the weights with the files, and make ready to compute in float32.

    Packed kernels are tried on a ``sample`` of tokens, where the model takes tokens.
    """
    runtime = found.runtime
    job.progress(f"{runtime}: loading")
    model = MlxRuntime.load(job.mlx_path, runtime=runtime, trust_remote_code=job.trust_remote_code)
    found.description = model.describe()
    found.checks.append(_weights(job, model))
    packed = model.quantized()
    model.to_float32(dense=packed and not sample)
    if packed and sample:
        tokens = list(range(1, _PACKED_TOKENS + 1))
        codes = model.sample(tokens)
        model.to_float32(dense=True)
        check = logits_check(
            "packed kernel",
            modality="weights",
            runtime=runtime,
            pairs=[("first tokens", model.sample(tokens), codes)],
        )
        found.checks.append(check)
    return model


def _weights(job: Judgement, model: MlxRuntime) -> Check:
    text_only = model.name == "mlx_lm" and job.text_only
    result = compare_loaded(job.mlx_path, model.parameters(), text_only=text_only)
    shown = "; ".join(result.problems[:_SHOWN])
    unused = f"{len(result.unused)} tensors of other modalities left alone" if result.unused else ""
    return Check(
        name="weights",
        modality="weights",
        runtime=model.name,
        value=float(len(result.problems)),
        threshold=0.0,
        verdict=at_most(float(len(result.problems)), 0.0),
        note=shown or unused or "as loaded equal as written, bit for bit",
        metrics={"tensors": result.tensors, "bytes": result.bytes},
    )


def compare_tokens(found: Found, model: MlxRuntime, questions: Iterable[Question]) -> None:
    """Check that the runtime's tokenizer makes the reference's ids of every text."""
    cases = []
    try:
        for question in questions:
            expected = question.tokenized
            if expected is None:
                continue
            differ = float(different_ids(expected, model.tokenize(question.case)))
            cases.append(CaseResult(question.case.name, differ, {"tokens": len(expected)}))
    except RuntimeRefusal as error:
        found.refused("tokens", "tokens", error)
        return
    if not cases:
        return
    value = float(sum(case.value for case in cases))
    found.checks.append(
        Check(
            name="tokens",
            modality="tokens",
            runtime=model.name,
            value=value,
            threshold=0.0,
            verdict=at_most(value, 0.0),
            note="token ids of both libraries, conversations through the chat template included",
            cases=tuple(cases),
        )
    )


Runs = list[tuple[int, Steps]]


def _by_modality(answers: Answers) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(answers.exact):
        groups.setdefault(item.question.case.modality, []).append(index)
    return groups


def _run(
    model: MlxRuntime, answers: Answers, rows: Sequence[int], inputs: Mapping[int, dict[str, Any]]
) -> Runs:
    runs = []
    for index in rows:
        item = answers.exact[index]
        if index in inputs:
            runs.append((index, model.run(inputs[index], item.greedy.tokens)))
        else:
            runs.append((index, model.continued(item.question.ids, item.greedy.tokens)))
    return runs


def _listen(model: MlxRuntime, answers: Answers, rows: Sequence[int], heard: list[Check]) -> Runs:
    """As ``_run``, with the sounds prepared anew: a fault may lie in the runtime's processor."""
    inputs, heard[:] = audio_inputs(model, answers, rows)
    return _run(model, answers, rows, inputs)


def _without_deviations(
    job: Judgement,
    found: Found,
    model: MlxRuntime,
    answers: Answers,
    modality: str,
    stock: Runs,
    run: Callable[[], Runs],
) -> Runs:
    """The stock runs, or where they miss the gate, runs without the runtime's documented faults.

    The stock error is then a row of its own: not gated as the checkpoint's, but failed when it is
    larger than the documented fault explains.
    """
    borrowed = any(answers.exact[index].question.borrowed for index, _ in stock)
    known = tuple(
        item
        for item in deviations_for(
            found.runtime, model_type=str(model.config.get("model_type")), modality=modality
        )
        if not (borrowed and item.prepares)
    )
    error = max(_error(answers.exact[index], steps) for index, steps in stock)
    if not known or not job.exact or error <= EXACT:
        return stock
    bound = max(item.bound for item in known)
    within = at_most(error, bound) == "pass"
    cases = (CaseResult(_label(answers.exact[i]), _error(answers.exact[i], s)) for i, s in stock)
    found.checks.append(
        Check(
            name="deviation",
            modality=modality,
            runtime=found.runtime,
            value=error,
            threshold=bound,
            verdict="info" if within else "fail",
            note="; ".join(item.what for item in known)
            + f". The other {modality} rows are judged with this fault taken out in memory.",
            cases=tuple(cases),
        )
    )
    if any(item.prepares for item in known):
        fed = {index: to_mlx(answers.exact[index].question.inputs) for index, _ in stock}
        run = partial(_run, model, answers, list(fed), fed)
    with without(known, model.model, model.config, source=job.source):
        return run()


def _aligned(wanted: Logits, found: Logits) -> tuple[Logits, Logits]:
    """The same positions of both; of a prompt that the runtime made longer or shorter, the last."""
    return (wanted, found) if len(wanted) == len(found) else (wanted[-1:], found[-1:])


def _error(item: Answer, steps: Steps) -> float:
    """Of the prompt's logits or those after it: some faults show only in single-token steps."""
    pairs = (_aligned(item.logits, steps.prefill), (item.greedy.logits, steps.steps))
    if any(wanted.shape != found.shape for wanted, found in pairs):
        return float("inf")
    return max(compare_logits(wanted, found).relative for wanted, found in pairs)


def _outputs(job: Judgement, found: Found, answers: Answers, modality: str, runs: Runs) -> None:
    prefix = _prefix(modality)
    where = {"modality": modality, "runtime": found.runtime}
    items = [(answers.exact[index], steps) for index, steps in runs]
    if job.exact:
        found.checks += [
            logits_check(
                f"{prefix}logits",
                pairs=[(_label(a), a.logits, s.prefill) for a, s in items],
                **where,
            ),
            logits_check(
                f"{prefix}decode",
                pairs=[(_label(a), a.greedy.logits, s.steps) for a, s in items],
                **where,
            ),
            greedy_check(
                f"{prefix}greedy",
                rows=[(_label(a), a.greedy, s.steps) for a, s in items],
                **where,
            ),
        ]


def _prefix(modality: str) -> str:
    return f"{modality}/" if modality in MEDIA_FILES else ""


def _loss(job: Judgement, found: Found, answers: Answers, modality: str, runs: Runs) -> None:
    """How far the stock runtime with these weights is from the original."""
    if not answers.original:
        return
    found.checks.append(
        loss_check(
            modality=modality,
            runtime=found.runtime,
            pairs=[
                (_label(answers.exact[i]), *_aligned(answers.original[i], s.prefill))
                for i, s in runs
            ],
            kl_threshold=job.kl_threshold,
            what="KL of the output's softmax from the original's, nats per position",
        )
    )


def _noise(job: Judgement, found: Found, answers: Answers) -> None:
    """The checkpoint in its own 16-bit dtype, as users run it.

    Where that misses the gate, documented faults are taken out: noise is what is measured here.
    """
    job.progress(f"{found.runtime}: computing in {job.dtype}")
    try:
        model = MlxRuntime.load(
            job.mlx_path, runtime=found.runtime, trust_remote_code=job.trust_remote_code
        )
        for modality, rows in _by_modality(answers).items():
            media = modality in MEDIA_FILES
            if media and found.runtime == "mlx_lm":
                continue
            known = deviations_for(
                found.runtime, model_type=str(model.config.get("model_type")), modality=modality
            )
            measure = partial(_noise_of, job, found, answers, model, modality, rows)
            check = measure()
            if check.verdict == "fail" and known:
                fed = any(item.prepares for item in known)
                with without(known, model.model, model.config, source=job.source):
                    check = measure(fed=fed)
                check = replace(check, note=f"{check.note}; the runtime's known faults taken out")
            found.checks.append(check)
    except RuntimeRefusal as error:
        found.refused("noise", "text", error)


def _label(item: Answer) -> str:
    return item.question.case.name


def _noise_of(
    job: Judgement,
    found: Found,
    answers: Answers,
    model: MlxRuntime,
    modality: str,
    rows: Sequence[int],
    *,
    fed: bool = False,
) -> Check:
    media = modality in MEDIA_FILES
    pairs = []
    for index in rows:
        item = answers.exact[index]
        inputs = (to_mlx(item.question.inputs) if fed else medium(model, item)) if media else None
        other = model.run(inputs).prefill if inputs else model.logits(item.question.ids)
        pairs.append((_label(item), item.logits, answers.noisy[index], other))
    return noise_check(modality=modality, runtime=found.runtime, dtype=job.dtype, rows=pairs)
