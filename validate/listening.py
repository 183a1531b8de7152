"""Sounds as the runtime's processor prepares them, held against the reference's preparation."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from validate.answers import Answers
from validate.checks import EXACT, CaseResult, Check
from validate.pixels import compare_pixels
from validate.prepared import Prepared, differing, prompt_row, row, stock_prompt
from validate.runtime import MlxRuntime

_ALSO_CALLED: Final = {"audio_input_features": "input_audio_embeds"}
"""The runtime's name of an input that the reference calls otherwise."""
_LEVELS: Final = ("audio_input_ids",)
"""Inputs that are sounds rounded to levels."""


def audio_inputs(
    model: MlxRuntime, answers: Answers, rows: Sequence[int], *, known: bool = False
) -> tuple[Prepared, list[Check]]:
    """Each sound through the runtime's processor, and how that differs from the reference's.

    Where it is ``known`` that they are prepared otherwise, the difference is told but not gated.
    """
    prepared: Prepared = {}
    ids, sounds, prompts = [], [], []
    for index in rows:
        item = answers.exact[index]
        inputs = prepared[index] = model.media_inputs(item.question.case)
        name = item.question.case.name
        ids.append(CaseResult(name, differing(item, inputs), {"tokens": len(item.question.ids)}))
        error, what = _compare_features(item.question.inputs, _heard(model, inputs))
        sounds.append(CaseResult(name, error, {"compared": what}))
        prompts.append(stock_prompt(model, item))
    note = "each side's own processor on the same sound"
    checks = [
        row("audio/input_ids", model, ids, threshold=0.0, note=note),
        row("audio/input_features", model, sounds, threshold=None if known else EXACT, note=note),
    ]
    checks += prompt_row("audio", model, prompts)
    return prepared, checks


def _heard(model: MlxRuntime, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs, with the features that a model makes of a sound where its processor does not."""
    extract = getattr(model.model, "sound_feature_extractor", None)
    if extract is None or "sound_clips" not in inputs:
        return inputs
    return {**inputs, "input_features": extract(inputs["sound_clips"])[0]}


def _compare_features(reference: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, str]:
    """Relative error of the float inputs that both processors make; infinity for none.

    Of sounds that are integers, which stand for levels, the share that differs.
    """
    named = {name: _ALSO_CALLED.get(name, name) for name in reference}
    both = [name for name in reference if named[name] in other]
    floats = [name for name in both if _is_float(reference[name])]
    if floats:
        errors = [compare_pixels(reference[name], other[named[name]])[0] for name in floats]
        return max(errors), ", ".join(floats)
    levels = [name for name in both if name in _LEVELS]
    if not levels:
        return float("inf"), f"no float input of {', '.join(sorted(reference))} has its like"
    return max(_unlike(reference[name], other[name]) for name in levels), ", ".join(levels)


def _unlike(reference: Any, other: Any) -> float:
    """The share of integers that differ; infinity where the shapes do."""
    a, b = np.asarray(reference), np.asarray(other)
    return float(np.mean(a != b)) if a.shape == b.shape else float("inf")


def _is_float(value: Any) -> bool:
    return bool(getattr(value, "is_floating_point", lambda: False)())
