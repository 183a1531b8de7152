"""One stock runtime on one checkpoint, held against the reference's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from validate.answers import Answer, Answers
from validate.arrays import to_mlx
from validate.batched import batch_check
from validate.cases import MEDIA
from validate.checks import EXACT, CaseResult, Check, Parting, at_most
from validate.deviations import deviations_for
from validate.fault import Deviation
from validate.gates import greedy_check, logits_check, loss_check, noise_check
from validate.judgement import Found, Judgement, compare_tokens, load_checked
from validate.listening import audio_inputs
from validate.looking import image_inputs, medium
from validate.metrics import compare_logits
from validate.partings import partings, with_partings
from validate.prepared import Prepared
from validate.quality import joined, score, statistics
from validate.runtime import Logits, MlxRuntime, RuntimeRefusal, Steps
from validate.streamed.runtime import StreamedRuntime
from validate.where.compare import Where
from validate.where.row import locate, where_check

_STATISTICS: Final = (
    *("perplexity", "perplexity_ratio", "perplexity_ratio_error", "kl_mean_error", "kl_median"),
    *("kl_p90", "kl_p999", "top1_error", "moved_rms"),
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
    groups = _by_modality(answers)
    written = [index for kind, rows in groups.items() if kind not in MEDIA for index in rows]
    together = _Together(model, answers, written) if isinstance(model, StreamedRuntime) else None
    for modality, rows in groups.items():
        if modality in MEDIA and runtime == "mlx_lm":
            continue
        job.progress(f"{runtime}: {modality}")
        heard: list[Check] = []
        try:
            if modality == "audio":
                run = partial(_listen, model, answers, rows, heard)
            else:
                inputs, seen = _prepared(model, answers, modality, rows)
                found.checks += seen
                run = partial(_run, model, answers, rows, inputs)
                if together is not None and modality not in MEDIA:
                    run = partial(together.runs, rows)
            stock = run()
            known = _needed_deviations(job, found, model, answers, modality, stock)
            prepared = any(item.prepares for item in known)
            if prepared:
                fed = {index: to_mlx(answers.exact[index].question.inputs) for index in rows}
                run = partial(_run, model, answers, rows, fed)
                if modality == "audio":
                    run = partial(_listen, model, answers, rows, heard, fed)
            with model.without(known, source=job.source):
                judged = run() if known else stock
                found.checks += heard
                _outputs(job, found, answers, modality, judged)
                # A batch runs the model whole, which a streamed proof has no room for.
                if modality == "text" and job.exact and not job.streamed:
                    job.progress(f"{runtime}: batch")
                    found.checks += batch_check(model, answers.exact)
                found.checks += _modules(job, model, answers, modality, fed=prepared)
            _loss(job, found, answers, modality, stock)
        except RuntimeRefusal as error:
            found.refused(f"{_prefix(modality)}logits", modality, error)
    if answers.noisy:
        _noise(job, found, answers)
    return found


Runs = list[tuple[int, Steps]]


def _by_modality(answers: Answers) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(answers.exact):
        groups.setdefault(item.question.case.modality, []).append(index)
    return groups


def _run(
    model: MlxRuntime, answers: Answers, rows: Sequence[int], inputs: Mapping[int, dict[str, Any]]
) -> Runs:
    items = [(index, answers.exact[index]) for index in rows]
    asked = [
        (inputs.get(index) or model.text_inputs(item.question.ids), item.greedy.tokens)
        for index, item in items
    ]
    return list(zip(rows, model.runs(asked), strict=True))


@dataclass
class _Together:
    """All written prompts at once, kind after kind: every weight is read for all of them."""

    model: StreamedRuntime
    answers: Answers
    rows: Sequence[int]
    _done: dict[tuple[Deviation, ...], dict[int, Steps]] = field(default_factory=dict)

    def runs(self, rows: Sequence[int]) -> Runs:
        """The runs of ``rows``, with the faults taken out that are so now."""
        known = self.model.known
        if known not in self._done:
            self._done[known] = dict(_run(self.model, self.answers, self.rows, {}))
        return [(index, self._done[known][index]) for index in rows]


def _prepared(
    model: MlxRuntime, answers: Answers, modality: str, rows: Sequence[int]
) -> tuple[Prepared, list[Check]]:
    """What the model is fed for pictures and videos, and the checks of how it was prepared."""
    if modality == "image":
        return image_inputs(model, answers, rows)
    fed = rows if modality == "video" else ()
    return {index: medium(model, answers.exact[index]) for index in fed}, []


def _listen(
    model: MlxRuntime,
    answers: Answers,
    rows: Sequence[int],
    heard: list[Check],
    fed: Mapping[int, dict[str, Any]] | None = None,
) -> Runs:
    """As ``_run``, with the sounds prepared anew: a fault may lie in the runtime's processor.

    Where that prepares them otherwise even so, the model gets what it is ``fed``.
    """
    inputs, heard[:] = audio_inputs(model, answers, rows, known=fed is not None)
    return _run(model, answers, rows, inputs if fed is None else fed)


def _needed_deviations(
    job: Judgement,
    found: Found,
    model: MlxRuntime,
    answers: Answers,
    modality: str,
    stock: Runs,
) -> tuple[Deviation, ...]:
    """The runtime's documented faults, where the stock runs miss the gate because of them.

    The stock error is then a row of its own: not gated as the checkpoint's, but failed when it is
    larger than the documented fault explains.
    """
    borrowed = any(answers.exact[index].question.borrowed for index, _ in stock)
    known = _documented(found.runtime, model, modality, borrowed=borrowed)
    error = max(_error(answers.exact[index], steps) for index, steps in stock)
    if not known or not job.exact or error <= EXACT:
        return ()
    bound = max(item.bound for item in known)
    within = at_most(error, bound) == "pass"
    cases = (CaseResult(_label(answers.exact[i]), _error(answers.exact[i], s)) for i, s in stock)
    place = _located(job, model, answers, modality)
    first = place.first.text() if place is not None and place.first is not None else ""
    found.checks.append(
        Check(
            name="deviation",
            modality=modality,
            runtime=found.runtime,
            value=error,
            threshold=bound,
            verdict="info" if within else "fail",
            note="; ".join(item.what for item in known)
            + f". The other {modality} rows are judged with this fault taken out in memory."
            + (f" As stock it {first}." if first else ""),
            cases=tuple(cases),
        )
    )
    return known


def _documented(
    runtime: str, model: MlxRuntime, modality: str, *, borrowed: bool
) -> tuple[Deviation, ...]:
    """The known faults; not those of preparing where the runtime prepared for both sides."""
    found = deviations_for(
        runtime, model_type=str(model.config.get("model_type")), modality=modality
    )
    return tuple(item for item in found if not (borrowed and item.prepares))


def _located(
    job: Judgement, model: MlxRuntime, answers: Answers, modality: str, *, fed: bool = False
) -> Where | None:
    """Where the runtime parts from the reference, as it computes now; None if not traced.

    ``fed``: with the pictures and sounds that the reference's processor prepared.
    """
    traced = answers.traced.get(modality)
    if traced is None or not job.rules:
        return None
    item = answers.exact[traced.question]
    if item.question.inputs:
        inputs = to_mlx(item.question.inputs) if fed else medium(model, item)
        run = partial(model.run, inputs)
    else:
        ids = item.question.ids[: traced.prompt]
        # The last token of a continuation is not fed, because nothing is asked of what follows.
        tokens = [*item.greedy.tokens[: traced.steps], 0]
        run = partial(model.continued, ids, tokens)
    return locate(model.model, job.mlx_path, job.rules, traced, run)


def _modules(
    job: Judgement,
    model: MlxRuntime,
    answers: Answers,
    modality: str,
    *,
    fed: bool,
) -> list[Check]:
    where = _located(job, model, answers, modality, fed=fed)
    if where is None:
        return []
    traced = answers.traced[modality]
    return [
        where_check(
            where,
            modality=modality,
            runtime=model.name,
            case=_label(answers.exact[traced.question]),
            noise=traced.reference.noise,
        )
    ]


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
        logits = logits_check(
            f"{prefix}logits", pairs=[(_label(a), a.logits, s.prefill) for a, s in items], **where
        )
        greedy = greedy_check(
            f"{prefix}greedy", rows=[(_label(a), a.greedy, s.steps) for a, s in items], **where
        )
        found.checks += [
            with_partings(
                logits, [_prompt_partings(job, a, a.logits, s.prefill) for a, s in items]
            ),
            logits_check(
                f"{prefix}decode",
                pairs=[(_label(a), a.greedy.logits, s.steps) for a, s in items],
                **where,
            ),
            with_partings(greedy, [_answer_partings(job, a, s) for a, s in items]),
        ]


def _prompt_partings(
    job: Judgement, item: Answer, wanted: Logits, found: Logits
) -> tuple[Parting, ...]:
    """Where the first choices for the prompt's own positions differ."""
    ids = item.question.ids
    fed = 1 if len(wanted) == len(found) == len(ids) else len(ids)
    return partings(*_aligned(wanted, found), job.words, ids=ids, fed=fed)


def _answer_partings(job: Judgement, item: Answer, steps: Steps) -> tuple[Parting, ...]:
    """Where they differ in the greedy answer, each after the reference's own tokens."""
    ids = item.question.ids
    said = [*ids, *item.greedy.tokens]
    return partings(item.greedy.logits, steps.steps, job.words, ids=said, fed=len(ids))


def _prefix(modality: str) -> str:
    return f"{modality}/" if modality in MEDIA else ""


def _loss(job: Judgement, found: Found, answers: Answers, modality: str, runs: Runs) -> None:
    """How far the stock runtime with these weights is from the original."""
    if not answers.original:
        return
    check = loss_check(
        modality=modality,
        runtime=found.runtime,
        pairs=[
            (_label(answers.exact[i]), *_aligned(answers.original[i], s.prefill)) for i, s in runs
        ],
        kl_threshold=job.kl_threshold,
        what="KL of the output's softmax from the original's, nats per position",
        statistics=_statistics(answers, runs) if modality not in MEDIA else None,
    )
    parted = [
        _prompt_partings(job, answers.exact[i], answers.original[i], s.prefill) for i, s in runs
    ]
    found.checks.append(with_partings(check, parted))


def _statistics(answers: Answers, runs: Runs) -> dict[str, float]:
    """llama.cpp's figures over the prompts' own tokens; none where a prompt has other positions."""
    parts = []
    for index, steps in runs:
        ids, reference = answers.exact[index].question.ids, answers.original[index]
        if len(ids) != len(reference) or reference.shape != steps.prefill.shape or len(ids) < 2:
            return {}
        parts.append(score(reference[:-1], steps.prefill[:-1], ids[1:]))
    found = statistics(joined(parts))
    return {name: found[name] for name in _STATISTICS}


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
            media = modality in MEDIA
            if media and found.runtime == "mlx_lm":
                continue
            borrowed = any(answers.exact[index].question.borrowed for index in rows)
            known = _documented(found.runtime, model, modality, borrowed=borrowed)
            measure = partial(_noise_of, job, found, answers, model, modality, rows)
            check = measure()
            if check.verdict == "fail" and known:
                fed = any(item.prepares for item in known)
                with model.without(known, source=job.source):
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
    media = modality in MEDIA
    pairs = []
    for index in rows:
        item = answers.exact[index]
        inputs = (to_mlx(item.question.inputs) if fed else medium(model, item)) if media else None
        other = model.run(inputs).prefill if inputs else model.logits(item.question.ids)
        pairs.append((_label(item), item.logits, answers.noisy[index], other))
    return noise_check(modality=modality, runtime=found.runtime, dtype=job.dtype, rows=pairs)
