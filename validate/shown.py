"""Pictures and sounds that an encoder embeds: its states of a prompt that holds one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from validate.answers import media_questions
from validate.arrays import to_mlx
from validate.checks import EXACT, CaseResult, Check, at_most
from validate.metrics import relative_error
from validate.modalities import hears, sees
from validate.reference import Logits, TorchReference, read_config
from validate.runtime import MlxRuntime

_PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Shown:
    """One picture or sound, as the release's processor prepares it, and the reference's states."""

    name: str
    modality: str
    inputs: Mapping[str, Any]
    states: Logits


def show(model: TorchReference, source: Path, *, trust_remote_code: bool) -> list[Shown]:
    """The fixed pictures and sounds, where the release embeds them together with texts.

    None of a pair of towers, whose texts and pictures never meet in one prompt.
    """
    config = read_config(source)
    if model.is_pair or not any((source / name).exists() for name in _PROCESSOR_FILES):
        return []
    kinds = [kind for kind, has in (("image", sees), ("audio", hears)) if has(config)]
    questions = [
        question
        for kind in kinds
        for question in media_questions(source, kind, trust_remote_code=trust_remote_code)
    ]
    return [
        Shown(one.case.name, one.case.modality, one.inputs, model.states(one.inputs))
        for one in questions
    ]


def compare_shown(runtime: MlxRuntime, shown: Sequence[Shown]) -> list[Check]:
    """A row for each kind: the runtime's states of the same prepared prompts."""
    return [
        _row(runtime, kind, [one for one in shown if one.modality == kind])
        for kind in dict.fromkeys(one.modality for one in shown)
    ]


def _row(runtime: MlxRuntime, kind: str, shown: Sequence[Shown]) -> Check:
    cases = tuple(
        CaseResult(one.name, relative_error(one.states, runtime.states(to_mlx(one.inputs))))
        for one in shown
    )
    value = max(case.value for case in cases)
    return Check(
        name=f"{kind}/hidden",
        modality=kind,
        runtime=runtime.name,
        value=value,
        threshold=EXACT,
        verdict=at_most(value, EXACT),
        note="last hidden state of the same prepared prompt",
        cases=cases,
    )
