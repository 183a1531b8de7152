"""Sounds as the runtime's processor prepares them, held against the reference's preparation."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from validate.answers import Answer, Answers
from validate.checks import EXACT, CaseResult, Check, at_most
from validate.metrics import compare_logits, different_ids
from validate.pixels import compare_pixels
from validate.runtime import MlxRuntime

_ALSO_CALLED: Final = {"audio_input_features": "input_audio_embeds"}
"""The runtime's name of an input that the reference calls otherwise."""
Prepared = dict[int, dict[str, Any]]
"""Model inputs by the question's place among the answers."""


def audio_inputs(
    model: MlxRuntime, answers: Answers, rows: Sequence[int]
) -> tuple[Prepared, list[Check]]:
    """Each sound through the runtime's processor, and how that differs from the reference's."""
    prepared: Prepared = {}
    ids, sounds, prompts = [], [], []
    for index in rows:
        item = answers.exact[index]
        inputs = prepared[index] = model.media_inputs(item.question.case)
        name = item.question.case.name
        ids.append(CaseResult(name, _differing(item, inputs), {"tokens": len(item.question.ids)}))
        error, what = _compare_features(item.question.inputs, inputs)
        sounds.append(CaseResult(name, error, {"compared": what}))
        prompts.append(_stock_prompt(model, item))
    note = "each side's own processor on the same sound"
    checks = [
        _row("audio/input_ids", model, ids, threshold=0.0, note=note),
        _row("audio/input_features", model, sounds, threshold=EXACT, note=note),
    ]
    if any(case.value for case in prompts):
        note = "the runtime's own prompt helper departs from the release's chat template"
        checks.append(_row("audio/prompt", model, prompts, threshold=None, note=note))
    return prepared, checks


def _stock_prompt(model: MlxRuntime, item: Answer) -> CaseResult:
    """Token ids that differ when the runtime's helper writes the prompt, and what that does."""
    inputs = model.media_inputs(item.question.case, stock_prompt=True)
    differ, name = _differing(item, inputs), item.question.case.name
    if not differ:
        return CaseResult(name, 0.0)
    compared = compare_logits(item.logits[-1:], model.run(inputs).prefill[-1:])
    metrics = {"kl": float(compared.kl[0]), "same_first_token": int(compared.agree[0])}
    return CaseResult(name, differ, metrics)


def _compare_features(reference: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, str]:
    """Relative error of the float inputs that both processors make; infinity for none."""
    named = {name: _ALSO_CALLED.get(name, name) for name in reference}
    shared = [name for name in reference if named[name] in other and _is_float(reference[name])]
    if not shared:
        return float("inf"), f"no float input of {', '.join(sorted(reference))} has its like"
    errors = [compare_pixels(reference[name], other[named[name]])[0] for name in shared]
    return max(errors), ", ".join(shared)


def _is_float(value: Any) -> bool:
    return bool(getattr(value, "is_floating_point", lambda: False)())


def _differing(item: Answer, inputs: Mapping[str, Any]) -> float:
    got = [int(token) for token in np.array(inputs["input_ids"]).ravel()]
    return float(different_ids(item.question.ids, got))


def _row(
    name: str,
    model: MlxRuntime,
    cases: Sequence[CaseResult],
    *,
    threshold: float | None,
    note: str,
) -> Check:
    value = max(case.value for case in cases)
    return Check(
        name=name,
        modality="audio",
        runtime=model.name,
        value=value,
        threshold=threshold,
        verdict=at_most(value, threshold),
        note=note,
        cases=tuple(cases),
    )
