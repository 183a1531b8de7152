"""What a runtime's processor made of pictures and sounds, held against the reference's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from validate.answers import Answer
from validate.checks import CaseResult, Check, at_most
from validate.metrics import compare_logits, different_ids
from validate.runtime import MlxRuntime

Prepared = dict[int, dict[str, Any]]
"""Model inputs by the question's place among the answers."""


def differing(item: Answer, inputs: Mapping[str, Any]) -> float:
    """How many token ids of ``inputs`` are not the reference's."""
    got = [int(token) for token in np.array(inputs["input_ids"]).ravel()]
    return float(different_ids(item.question.ids, got))


def stock_prompt(model: MlxRuntime, item: Answer) -> CaseResult:
    """Token ids that differ when the runtime's helper writes the prompt, and what that does."""
    inputs = model.media_inputs(item.question.case, stock_prompt=True)
    differ, name = differing(item, inputs), item.question.case.name
    if not differ:
        return CaseResult(name, 0.0)
    compared = compare_logits(item.logits[-1:], model.run(inputs).prefill[-1:])
    metrics = {"kl": float(compared.kl[0]), "same_first_token": int(compared.agree[0])}
    return CaseResult(name, differ, metrics)


def prompt_row(modality: str, model: MlxRuntime, prompts: Sequence[CaseResult]) -> list[Check]:
    """The row that says how the helper's prompts differ; none where they do not."""
    if not any(case.value for case in prompts):
        return []
    note = "the runtime's own prompt helper departs from the release's chat template"
    return [row(f"{modality}/prompt", model, prompts, threshold=None, note=note)]


def row(
    name: str, model: MlxRuntime, cases: Sequence[CaseResult], *, threshold: float | None, note: str
) -> Check:
    """A check of the worst of ``cases``; its ``name`` begins with the modality."""
    value = max(case.value for case in cases)
    return Check(
        name=name,
        modality=name.partition("/")[0],
        runtime=model.name,
        value=value,
        threshold=threshold,
        verdict=at_most(value, threshold),
        note=note,
        cases=tuple(cases),
    )
