"""Towers that only look: the states they make of a picture, instead of logits."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from validate.cases import MEDIA_FILES, Case, draw, load_cases
from validate.checks import EXACT, CaseResult, Check, at_most
from validate.judgement import Found, Judgement, load_checked
from validate.metrics import relative_error
from validate.reference import Logits, TorchReference
from validate.runtime import MlxRuntime, RuntimeRefusal, Steps
from validate.where.row import Traced, locate, where_check
from validate.where.torch_trace import states_of, trace_reference
from validate.where.trace import MOST_OF_MEDIA


def only_looks(config: Mapping[str, Any]) -> bool:
    """Whether the architecture takes pictures and no text."""
    return "num_channels" in config and not {"vocab_size", "text_config"} & set(config)


def judge_pictures(
    job: Judgement, *, source: Path, dequantized: Path | None
) -> tuple[dict[str, Any], Found]:
    """Description of the reference, and every check of a tower in mlx-vlm.

    Both models are fed what the release's processor makes of the generated pictures, because the
    runtime's tower has no processor of its own.
    """
    cases = load_cases(MEDIA_FILES["image"])
    job.progress("torch: loading the reference")
    model = TorchReference.load(dequantized or source, trust_remote_code=job.trust_remote_code)
    if dequantized is None and not model.holds_in(job.dtype):
        model.round_to(job.dtype)
    pixels = [prepared_picture(source, case) for case in cases]
    wanted = [model.picture(pixel) for pixel in pixels]
    found = Found("mlx_vlm", description={"name": "mlx_vlm"})
    try:
        runtime = load_checked(job, found)
        states = [runtime.picture(pixel) for pixel in pixels]
        found.checks.append(_states(cases, wanted, states, found.runtime))
        if job.rules:
            found.checks.append(_modules(job, model, runtime, cases[0], pixels[0]))
    except RuntimeRefusal as error:
        found.refused("load", "weights", error)
    return model.describe(), found


def prepared_picture(source: Path, case: Case) -> Any:
    """What the release's processor makes of a picture, as torch [1, channels, rows, columns]."""
    images: Any = import_module("transformers").AutoImageProcessor
    processor = images.from_pretrained(source, backend="pil", local_files_only=True)
    return processor(images=draw(case), return_tensors="pt")["pixel_values"]


def _modules(
    job: Judgement, reference: TorchReference, runtime: MlxRuntime, case: Case, pixels: Any
) -> Check:
    """Where the two towers part on one picture."""
    job.progress("torch: modules, image")
    traced = trace_reference(
        reference.model,
        reference.folder,
        reference.cast({"pixel_values": pixels}),
        most=MOST_OF_MEDIA,
        call=states_of,
        bearing=True,
    )

    def run() -> Steps:
        states = runtime.picture(pixels)
        return Steps(prefill=states, steps=states[-1:])

    where = locate(
        runtime.model, job.mlx_path, job.rules, Traced(0, len(traced.logits), 0, traced), run
    )
    return where_check(
        where, modality="image", runtime=runtime.name, case=case.name, noise=traced.noise
    )


def _states(
    cases: Sequence[Case], wanted: Sequence[Logits], found: Sequence[Logits], runtime: str
) -> Check:
    results = tuple(
        CaseResult(case.name, relative_error(a, b))
        for case, a, b in zip(cases, wanted, found, strict=True)
    )
    value = max(result.value for result in results)
    return Check(
        name="image/hidden",
        modality="image",
        runtime=runtime,
        value=value,
        threshold=EXACT,
        verdict=at_most(value, EXACT),
        note="last hidden state of the same prepared picture",
        cases=results,
    )
