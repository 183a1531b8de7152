"""Parity of an MLX checkpoint with its torch source, on the fixed prompts.

Works on folders alone and knows nothing about how the checkpoint was made. Two statements are kept
apart. *Exactness*: the stock runtime computes what torch computes from the same weights, both in
float32; this must hold. *Loss*: how far quantizing moved the outputs from the original; this is
reported, and gated only by a threshold the user sets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arch_maps.registry import ArchMap, find, map_name
from validate.alone import judge_alone, look_alone, no_reference
from validate.answers import (
    Answers,
    answer,
    media_questions,
    only_logits,
    text_questions,
    trace_questions,
)
from validate.assistant import assists, judge_assistant
from validate.checks import Check, Report
from validate.encoder import judge_encoder
from validate.judge import judge_runtime
from validate.judgement import Judgement
from validate.loaded import weight_dtypes
from validate.looking import INSTALL, borrowed_questions
from validate.modalities import hears, sees
from validate.partings import Words
from validate.pictures import judge_pictures, only_looks
from validate.reference import ReferenceError, TorchReference, lacks_class, read_config
from validate.runtime import is_generative, prepare_mlx, runtimes_for
from validate.speculative import drafter_weights
from validate.streamed.asking import ask_streamed, streamed_row
from validate.streamed.tensors import Streaming
from validate.templates import template_problem
from validate.torch_faults import unbuilt
from validate.watching import unanswered, video_questions
from validate.where.row import rules_of

_COMPUTE: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
TOWER: Final = "image/tower"
"""Name of the row that says that the reference has no part for pictures here."""
_IMAGE_FILES: Final = ("preprocessor_config.json", "processor_config.json")


def run_parity(
    *,
    source: Path,
    mlx_path: Path,
    plan: str | None,
    dequantized: Path | None = None,
    images: bool | None = None,
    kl_threshold: float | None = None,
    progress: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
    arch: ArchMap | None = None,
    streaming: Streaming | None = None,
    unread: str = "",
) -> Report:
    """Judge ``mlx_path`` against the torch checkpoint ``source``.

    ``dequantized``: torch folder with the weights the output really holds, as float32 values;
    needed for exactness when the output is quantized or narrower than the source. ``images``: None
    judges pictures where the config has a vision part; sounds are judged where it has an audio
    part. ``arch`` is the map, None for the registry's; it tells which modules to compare.
    ``streaming`` runs text block by block, with weights from there and not from ``dequantized``.
    Raises ReferenceError or CheckpointError when a folder cannot be judged at all; what a runtime
    refuses is a failed check instead. Where torch has no class for the release, or its weights are
    not here (``unread`` says why), the runtime is judged alone and nothing is proven.
    """
    say = progress or (lambda message: None)
    for folder in dict.fromkeys((source, mlx_path)):
        if problem := template_problem(folder):
            return _not_rendered(problem, plan=plan, source=source)
    fast = prepare_mlx()
    config = read_config(mlx_path)
    checks: list[Check] = []
    quantized = bool(config.get("quantization"))
    held = dequantized is not None or (streaming is not None and streaming.exact is not None)
    exact = held or not quantized
    missing = unread or lacks_class(source, trust_remote_code=trust_remote_code)
    if missing:
        checks.append(no_reference(missing))
    elif quantized and not exact:
        checks.append(_no_exactness())
    if missing or streaming:
        wants_images = _reads_pictures(config)
    else:
        wants_images = _wants_images(source, images, checks)
    media = (*(("image",) if wants_images else ()), *(("audio",) if hears(config) else ()))
    judgement = Judgement(
        mlx_path=mlx_path,
        source=source,
        quantized=quantized,
        dtype=_compute_dtype(mlx_path),
        exact=exact,
        kl_threshold=kl_threshold,
        progress=say,
        trust_remote_code=trust_remote_code,
        text_only=sees(config) or hears(config),
        rules=()
        if missing or streaming
        else rules_of(dequantized or source, read_config(source), arch),
        words=Words()
        if missing or not is_generative(config)
        else Words.of(source, trust_remote_code=trust_remote_code),
        streamed=streaming is not None,
    )
    if streaming is not None:
        checks.append(streamed_row(streaming, judgement, media))
        _require_blocks(config)
    runtimes = runtimes_for(config, mlx_path)
    if not runtimes:
        checks.append(_no_runtime(str(config.get("model_type"))))
    described: dict[str, Any] = {"fast_blas": fast, "runtimes": []}
    if missing and "dflash_config" in config:
        described["runtimes"].append({"name": "mlx_vlm"})
        reference: dict[str, Any] = {"class": "none", "folder": source.name}
        checks += drafter_weights(mlx_path)
    elif missing:
        reference = {"class": "none", "folder": source.name}
        for runtime in runtimes:
            shown = () if streaming is not None else media
            found = judge_alone(judgement, source=source, runtime=runtime, media=shown)
            checks += found.checks
            described["runtimes"].append(found.description)
    elif assists(config):
        reference, found = judge_assistant(
            judgement, config, source=source, dequantized=dequantized
        )
        checks += found.checks
        described["runtimes"].append(found.description)
    elif is_generative(config):
        if streaming is not None:
            reference, answers = ask_streamed(streaming, judgement)
        else:
            if "image" in media and "mlx_vlm" in runtimes:
                media = (*media, "video")
            reference, answers = _ask(source, dequantized, judgement, media, checks)
        for runtime in runtimes:
            found = judge_runtime(judgement, answers, runtime=runtime)
            checks += found.checks
            described["runtimes"].append(found.description)
        if (
            "mlx_vlm" in runtimes
            and images is None
            and sees(config)
            and not _reads_pictures(config)
            and streaming is None
        ):
            checks += look_alone(judgement, source)
    elif only_looks(config):
        reference, found = judge_pictures(judgement, source=source, dequantized=dequantized)
        checks += found.checks
        described["runtimes"].append(found.description)
    else:
        reference, found = judge_encoder(judgement, source=source, dequantized=dequantized)
        checks += found.checks
        described["runtimes"].append(found.description)
    return Report(
        plan=plan, reference=reference, runtime=described, checks=tuple(_settle_metal(checks))
    )


def _require_blocks(config: Mapping[str, Any]) -> None:
    """Raise ReferenceError for what is no text model of its own, and so is not streamed."""
    if assists(config) or not is_generative(config):
        raise ReferenceError(
            "it cannot be judged block by block: only models that write text can. "
            "Give --memory-limit a size that it needs whole, or judge it on a larger machine"
        )


def _not_rendered(problem: str, *, plan: str | None, source: Path) -> Report:
    """The report of a release whose chat template is not run in this process."""
    row = Check(
        name="chat template",
        modality="tokens",
        verdict="fail",
        note=f"{problem}. Nothing was run: whoever uses the template would be stopped by it, too",
    )
    reference = {"class": "not run", "folder": source.name}
    return Report(plan=plan, reference=reference, runtime={"runtimes": []}, checks=(row,))


def _ask(
    source: Path,
    dequantized: Path | None,
    judgement: Judgement,
    media: Sequence[str],
    checks: list[Check],
) -> tuple[dict[str, Any], Answers]:
    trust = judgement.trust_remote_code
    say = judgement.progress
    say("torch: loading the reference")
    model = TorchReference.load(dequantized or source, trust_remote_code=trust)
    described: dict[str, Any] = model.describe()
    rounded = False
    if dequantized is None and not judgement.quantized and not model.holds_in(judgement.dtype):
        model.round_to(judgement.dtype)
        rounded = True
        described["rounded_to"] = judgement.dtype
    questions = text_questions(source, vocab_size=model.vocab_size, trust_remote_code=trust)
    for kind in media:
        if kind == "video":  # asked after all others
            continue
        try:
            questions += media_questions(source, kind, trust_remote_code=trust)
        except ReferenceError as error:
            if kind == "image":
                borrowed, row = borrowed_questions(judgement.mlx_path, error)
                questions += borrowed
            else:
                note = str(error).strip()
                row = Check(name=f"{kind}/input_ids", modality=kind, verdict="fail", note=note)
            checks.append(row)
    exact = answer(model, questions, say)
    if "video" in media:
        watched, rows = video_questions(judgement.mlx_path, source=source, trust_remote_code=trust)
        try:
            exact += answer(model, watched, say)
            questions += watched
        except Exception as error:  # the inputs are not the release's: what torch says is no fault
            rows = [unanswered(error)]
        checks += rows
    traced = trace_questions(model, exact, say) if judgement.rules and judgement.exact else {}
    answers = Answers(exact=exact, traced=traced)
    model.close()
    if rounded or dequantized is not None:
        say("torch: the original weights")
        model = TorchReference.load(source, trust_remote_code=trust)
        answers = replace(answers, original=only_logits(model, questions))
        model.close()
    elif judgement.quantized:
        answers = replace(answers, original=tuple(a.logits for a in answers.exact))
    if not judgement.quantized and judgement.dtype != "float32":
        say(f"torch: its own error in {judgement.dtype}")
        model = TorchReference.load(
            dequantized or source, dtype=judgement.dtype, trust_remote_code=trust
        )
        answers = replace(answers, noisy=only_logits(model, questions))
        model.close()
    return described, answers


def _compute_dtype(mlx_path: Path) -> str:
    """The float type that holds most of the checkpoint."""
    for code in weight_dtypes(mlx_path):
        if code in _COMPUTE:
            return _COMPUTE[code]
    return "float32"


def _reads_pictures(config: Mapping[str, Any]) -> bool:
    """Whether pictures belong to the type: its processor may be the runtime's own alone."""
    arch = find(str(map_name(config)))
    return "image" in arch.modalities if arch else "vision_config" in config


def _wants_images(source: Path, images: bool | None, checks: list[Check]) -> bool:
    config = read_config(source)
    if images is False or (images is None and not (sees(config) and is_generative(config))):
        return False
    if images is None and not _reads_pictures(config):
        checks.append(_unjudged_pictures())
        return False
    if unbuilt(str(config.get("model_type"))):
        checks.append(_no_tower())
        return False
    if any((source / name).exists() for name in _IMAGE_FILES):
        return True
    if images:
        raise ReferenceError(f"{source}: no image processor (none of {', '.join(_IMAGE_FILES)})")
    checks.append(
        Check(
            name="image/input_ids",
            modality="image",
            verdict="fail",
            note="the release sees images but brings no processor to prepare one; "
            "judge its text alone with images off",
        )
    )
    return False


def _unjudged_pictures() -> Check:
    return Check(
        name="image/logits",
        modality="image",
        verdict="info",
        note="not judged: the runtime is known to be wrong about pictures of this type, as the "
        "remarks of its map say",
    )


def _no_tower() -> Check:
    return Check(
        name=TOWER,
        modality="image",
        verdict="info",
        note="not judged: transformers takes the tower of pictures from timm, which is not "
        f"installed here, so the reference was built without it. {INSTALL}",
        metrics={"missing": "timm"},
    )


def _no_exactness() -> Check:
    return Check(
        name="logits",
        modality="text",
        verdict="fail",
        note="quantized output, and no torch checkpoint of its dequantized weights to hold the "
        "runtime against: a wrong layout cannot be told from the loss of quantizing",
    )


def _no_runtime(model_type: str) -> Check:
    return Check(
        name="load",
        modality="weights",
        verdict="fail",
        note=f"neither mlx-vlm nor mlx-lm has a model for model_type {model_type!r}",
    )


def _settle_metal(checks: list[Check]) -> list[Check]:
    """A runtime that needs Metal fails the report unless another runtime proved the outputs."""
    proven = any(check.proves_outputs for check in checks)
    return [
        replace(check, verdict="info") if proven and check.metrics.get("needs_metal") else check
        for check in checks
    ]
