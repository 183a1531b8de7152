"""Pictures as the runtime's processor prepares them, held against the reference's preparation.

A processor is not the model: where one side's cannot prepare a picture, that is a row of its own,
and both models are fed what the other side's processor made of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from validate.answers import Answer, Answers, Question
from validate.arrays import to_mlx, to_torch
from validate.cases import MEDIA_FILES, load_cases
from validate.checks import EXACT, CaseResult, Check, Verdict
from validate.deviations import deviations_for
from validate.fault import Deviation
from validate.libraries import missing_library
from validate.molmo_faults import picture_tokens
from validate.pixels import compare_pixels
from validate.prepared import Prepared, differing, prompt_row, row, stock_prompt
from validate.processor_faults import processor_fault
from validate.reference import ReferenceError, read_config
from validate.runtime import MlxRuntime, RuntimeRefusal

PROCESSOR: Final = "image/processor"
INSTALL: Final = "Install mlx-dayzero[vision] (torchvision and timm) to have them judged."


def image_inputs(
    model: MlxRuntime, answers: Answers, rows: Sequence[int]
) -> tuple[Prepared, list[Check]]:
    """Each picture as the model gets it, and how that differs from what the reference got."""
    items = {index: answers.exact[index] for index in rows}
    try:
        prepared = {i: model.media_inputs(item.question.case) for i, item in items.items()}
    except RuntimeRefusal as error:
        fed = {index: to_mlx(item.question.inputs) for index, item in items.items()}
        return fed, [_refused(model, error)]
    checks = []
    if not any(item.question.borrowed for item in items.values()):
        other = _prepared_otherwise(model.name, str(model.config.get("model_type")))
        pairs = [(item, prepared[index]) for index, item in items.items()]
        checks += [_unlike(model, other)] if other else []
        checks += [] if other and other.foreign else _compared(model, pairs, known=bool(other))
    prompts = [stock_prompt(model, item) for item in items.values()]
    checks += prompt_row("image", model, prompts)
    return prepared, checks


def medium(model: MlxRuntime, item: Answer) -> dict[str, Any]:
    """A question's inputs by the runtime's processor, or the reference's where that fails."""
    try:
        return model.media_inputs(item.question.case)
    except RuntimeRefusal:
        return to_mlx(item.question.inputs)


def borrowed_questions(mlx_path: Path, error: ReferenceError) -> tuple[list[Question], Check]:
    """The picture questions through the runtime's processor, where the release's has no library.

    None of them when a library is not what ``error`` is about, or the runtime's fails as well; the
    row then fails.
    """
    library, note = missing_library(error), str(error).strip()
    questions = []
    other = _prepared_otherwise("mlx_vlm", str(read_config(mlx_path).get("model_type")))
    if library and other is not None and other.foreign:
        note = f"not judged: {note}. {other.what}, so that its pictures cannot stand in. {INSTALL}"
        missing = {"missing": library}
        return [], Check(PROCESSOR, "image", "info", note=note, metrics=missing)
    if library:
        try:
            model = MlxRuntime.load(mlx_path, runtime="mlx_vlm", lazy=True)
            for case in load_cases(MEDIA_FILES["image"]):
                inputs = to_torch(model.media_inputs(case))
                ids = tuple(int(token) for token in inputs["input_ids"][0])
                inputs |= _marked(ids, picture_tokens(model.config))
                questions.append(Question(case, ids, inputs=inputs, borrowed=True))
        except RuntimeRefusal as refusal:
            questions, note = [], f"{note}. {refusal}"
    row = Check(name=PROCESSOR, modality="image", verdict="fail", note=note)
    if not questions:
        return [], row
    note += (
        ". Both models are fed what the runtime's processor made of the pictures, so that nothing "
        "here says whether it prepares them as the release does."
    )
    return questions, replace(row, verdict="info", note=note, metrics={"missing": str(library)})


def _prepared_otherwise(runtime: str, model_type: str) -> Deviation | None:
    """The documented deviation of a runtime that prepares pictures otherwise; None without one."""
    known = deviations_for(runtime, model_type=model_type, modality="image")
    return next((item for item in known if item.prepares), None)


def _unlike(model: MlxRuntime, other: Deviation) -> Check:
    note = (
        f"{other.what}. The gated image rows are judged with the pictures that the reference's "
        "processor prepared."
    )
    return Check(PROCESSOR, "image", "info", runtime=model.name, note=note)


def _marked(ids: Sequence[int], pictures: Sequence[int]) -> dict[str, Any]:
    """What the release's processor adds where ``pictures`` are seen whole: 1 for their tokens."""
    import torch

    kinds = [[int(token in pictures) for token in ids]]
    return {"mm_token_type_ids": torch.tensor(kinds)} if pictures else {}


def _refused(model: MlxRuntime, error: RuntimeRefusal) -> Check:
    """The runtime's processor failed: a known fault of it, a library not there, or unexplained."""
    library = missing_library(error)
    known = processor_fault(
        model.name, model_type=str(model.config.get("model_type")), error=str(error)
    )
    verdict: Verdict = "info" if library or known else "fail"
    what = f"{known.what}. " if known else ""
    return Check(
        name=PROCESSOR,
        modality="image",
        runtime=model.name,
        verdict=verdict,
        note=f"{what}{error}. The other image rows are judged with the pictures that the "
        "reference's processor prepared.",
        metrics={"missing": library} if library else {},
    )


def _compared(
    model: MlxRuntime, pairs: Sequence[tuple[Answer, dict[str, Any]]], *, known: bool
) -> list[Check]:
    """Ids and pixels of both processors; measured only where they are ``known`` to differ."""
    ids, pixels = [], []
    for item, inputs in pairs:
        name, size = item.question.case.name, len(item.question.ids)
        ids.append(CaseResult(name, differing(item, inputs), {"tokens": size}))
        error, layout = compare_pixels(item.question.inputs["pixel_values"], inputs["pixel_values"])
        pixels.append(CaseResult(name, error, {"layout": layout}))
    note = "each side's own processor on the same picture"
    rows = [
        row("image/input_ids", model, ids, threshold=None if known else 0.0, note=note),
        row("image/pixel_values", model, pixels, threshold=None if known else EXACT, note=note),
    ]
    return [replace(found, verdict="info") for found in rows] if known else rows
