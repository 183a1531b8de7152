"""A runtime on its own, for releases that no torch class here computes.

Nothing is held against a reference, so none of this proves that the numbers are the release's.
It shows that the checkpoint loads as written, computes finite numbers, and computes the same ones
whether a prompt comes whole or token by token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from validate.answers import Question, text_questions
from validate.cases import MEDIA, MEDIA_FILES, load_cases
from validate.checks import NOT_COMPARED, REFERENCE, CaseResult, Check, at_most
from validate.gates import logits_check
from validate.judgement import Found, Judgement, compare_tokens, load_checked
from validate.processor import load_tokenizer
from validate.reference import Logits, ReferenceError
from validate.runtime import Asked, MlxRuntime, RuntimeRefusal, Steps, is_generative

_EMBEDS: Final = "inputs_embeds"
_FORBIDDEN: Final = -5e4
"""Logits below it are not computed but set, to keep a token from being chosen."""
STEPS: Final = 12
"""Tokens fed singly at the end of a prompt; the first prompt is fed singly from its start."""


def no_reference(why: str) -> Check:
    """The row that says why nothing was compared and what would change that."""
    return Check(
        name=REFERENCE, modality="text", verdict="info", note=f"{NOT_COMPARED}: {why.strip()}"
    )


def judge_alone(job: Judgement, *, source: Path, runtime: str, media: Sequence[str]) -> Found:
    """Every check of ``runtime`` that needs no reference, of text and of the kinds of ``media``."""
    found = Found(runtime, description={"name": runtime})
    try:
        model = load_checked(job, found)
    except RuntimeRefusal as error:
        found.refused("load", "weights", error)
        return found
    named = found.description["model"]
    found.checks.insert(0, Check("load", "weights", "pass", runtime=runtime, note=named))
    try:
        vocab = model.sample([1]).shape[-1]
        questions = text_questions(
            source, vocab_size=vocab, trust_remote_code=job.trust_remote_code
        )
        compare_tokens(found, model, questions)
        job.progress(f"{runtime}: text")
        if is_generative(model.config):
            _text(found, model, questions)
        else:
            hidden = [(q.case.name, model.hidden(q.ids)[0]) for q in questions]
            found.checks.append(_finite("finite", "sentence", runtime, hidden))
    except ReferenceError as error:
        found.checks.append(Check("tokens", "tokens", "fail", runtime=runtime, note=str(error)))
    except RuntimeRefusal as error:
        found.refused("finite", "text", error)
    for kind in media if runtime == "mlx_vlm" else ():
        job.progress(f"{runtime}: {kind}")
        try:
            untold = not _has_template(source, job.trust_remote_code)
            _medium(found, model, kind, stock_prompt=untold)
        except (RuntimeRefusal, ReferenceError) as error:
            found.checks.append(
                Check(f"{kind}/finite", kind, "fail", runtime=runtime, note=str(error))
            )
    return found


def look_alone(job: Judgement, source: Path) -> list[Check]:
    """Pictures that are not judged: whether mlx-vlm runs them, whole and in pieces alike.

    Where it does not, the row says so and fails nothing: nothing was promised of these pictures.
    """
    found = Found("mlx_vlm")
    try:
        model = MlxRuntime.load(
            job.mlx_path, runtime="mlx_vlm", trust_remote_code=job.trust_remote_code
        )
        model.to_float32(dense=model.quantized())
        untold = not _has_template(source, job.trust_remote_code)
        _medium(found, model, "image", stock_prompt=untold)
    except (RuntimeRefusal, ReferenceError) as error:
        note = f"not run: {error}"
        return [Check("image/finite", "image", "info", runtime="mlx_vlm", note=note)]
    return found.checks


def _has_template(source: Path, trust_remote_code: bool) -> bool:
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return bool(getattr(tokenizer, "chat_template", None))


def _text(found: Found, model: MlxRuntime, questions: Sequence[Question]) -> None:
    """Every prompt whole, and with its last tokens one at a time, all asked for at once."""
    asked: list[Asked] = []
    for index, question in enumerate(questions):
        ids = question.ids
        start = max(1, 1 if index == 0 else len(ids) - STEPS)
        # What follows the last token is never fed, so any id does.
        pieces = (model.text_inputs(ids[:start]), [*ids[start:], 0])
        asked += [(model.text_inputs(ids), ()), pieces]
    runs = model.runs(asked)
    pairs = [
        (question.case.name, whole.prefill, _every_position(pieces))
        for question, whole, pieces in zip(questions, runs[::2], runs[1::2], strict=True)
    ]
    _record(found, "text", pairs)


def _every_position(run: Steps) -> Logits:
    """Logits of the prompt's positions and of those that were fed after it."""
    return np.concatenate([run.prefill, run.steps[1:]])


def _medium(found: Found, model: MlxRuntime, kind: str, *, stock_prompt: bool) -> None:
    """Ask about one picture or sound: some towers take half a minute for each on a CPU.

    ``stock_prompt`` for releases without a chat template, whose prompts are the runtime's.
    """
    pairs = []
    for case in load_cases(MEDIA_FILES[kind])[:1]:
        inputs = model.media_inputs(case, stock_prompt=stock_prompt)
        ids = [int(token) for token in np.array(inputs["input_ids"]).ravel()]
        start = len(ids) - _words_after_medium(ids)
        with _seen_once(model.model):
            whole = model.run(inputs).prefill
            run = model.run(_first(inputs, start, len(ids)), [*ids[start:], 0])
        pairs.append((case.name, *_allowed(whole, _every_position(run))))
    _record(found, kind, pairs)


def _allowed(whole: Logits, pieces: Logits) -> tuple[Logits, Logits]:
    """Both without the tokens that a runtime forbids in one of them, as where it may point."""
    forbidden = (whole < _FORBIDDEN) | (pieces < _FORBIDDEN)
    return np.where(forbidden, 0, whole), np.where(forbidden, 0, pieces)


@contextmanager
def _seen_once(model: Any) -> Iterator[None]:
    """Let the tower run once: a part of a prompt takes its part of what the whole became.

    Only where the prompt becomes embeddings and nothing else; positions are not cut here. A picture
    may be one token of the prompt and many embeddings, so what is cut off is counted from the end.
    """
    embed = model.get_input_embeddings
    kept: list[Any] = []
    length = 0

    def remembered(ids: Any, *others: Any, **settings: Any) -> Any:
        nonlocal length
        if kept and not any(v is not None for k, v in kept[0].to_dict().items() if k != _EMBEDS):
            whole = kept[0].inputs_embeds
            end = whole.shape[1] - (length - ids.shape[1])
            return replace(kept[0], inputs_embeds=whole[:, :end])
        if not kept:
            length = ids.shape[1]
        kept.append(embed(ids, *others, **settings))
        return kept[-1]

    model.get_input_embeddings = remembered
    try:
        yield
    finally:
        del model.get_input_embeddings


def _words_after_medium(ids: Sequence[int]) -> int:
    """How many of the last tokens are certainly text: a medium is a run of one repeated id."""
    last = max((i for i in range(1, len(ids)) if ids[i] == ids[i - 1]), default=0)
    return max(1, min(STEPS // 3, len(ids) - 1 - last))


def _first(inputs: Mapping[str, Any], count: int, length: int) -> dict[str, Any]:
    """The inputs of the prompt's first ``count`` tokens: every [1, length] array is cut."""
    return {
        key: value[:, :count] if getattr(value, "shape", None) == (1, length) else value
        for key, value in inputs.items()
    }


def _record(found: Found, modality: str, pairs: Sequence[tuple[str, Logits, Logits]]) -> None:
    prefix = f"{modality}/" if modality in MEDIA else ""
    rows = [(name, whole) for name, whole, _ in pairs]
    found.checks += [
        _finite(f"{prefix}finite", modality, found.runtime, rows),
        logits_check(
            f"{prefix}prefill = decode", modality=modality, runtime=found.runtime, pairs=pairs
        ),
    ]


def _finite(name: str, modality: str, runtime: str, rows: Sequence[tuple[str, Logits]]) -> Check:
    cases = tuple(CaseResult(n, float(np.count_nonzero(~np.isfinite(x)))) for n, x in rows)
    value = sum(case.value for case in cases)
    return Check(
        name=name,
        modality=modality,
        runtime=runtime,
        value=value,
        threshold=0.0,
        verdict=at_most(value, 0.0),
        note="outputs that are not finite numbers",
        cases=cases,
    )
