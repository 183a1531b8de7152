"""What is judged, what was found of it, and the checks that come with loading a checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from arch_maps.rules import Rule
from validate.answers import Question
from validate.checks import CaseResult, Check, at_most
from validate.gates import logits_check
from validate.loaded import compare_loaded
from validate.metrics import different_ids
from validate.partings import Words
from validate.processor_faults import OWN_TEMPLATES, UNSPOKEN
from validate.runtime import MlxRuntime, RuntimeRefusal
from validate.streamed.runtime import StreamedRuntime

_PACKED_TOKENS: Final = 4
_PACKED_STREAMED: Final = 1
"""Tokens through the packed kernels; fewer where another pass reads all weights for each kind."""
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
    rules: tuple[Rule, ...] = ()
    """The map's rules for the reference's tensors; they pair its modules with the runtime's."""
    words: Words = field(default_factory=Words)
    """Text of the release's tokens."""
    streamed: bool = False
    """Whether the runtime, too, holds the weights of one block at a time."""


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


def load_checked(job: Judgement, found: Found, *, sample: bool = True) -> MlxRuntime:
    """Load, compare the weights with the files, and make ready to compute in float32.

    Packed kernels are tried on a ``sample`` of tokens, where the model takes tokens.
    """
    runtime = found.runtime
    job.progress(f"{runtime}: loading")
    kind = StreamedRuntime if job.streamed else MlxRuntime
    model = kind.load(job.mlx_path, runtime=runtime, trust_remote_code=job.trust_remote_code)
    found.description = model.describe()
    found.checks.append(_weights(job, model))
    packed = model.quantized()
    model.to_float32(dense=packed and not sample)
    if packed and sample:
        tokens = list(range(1, (_PACKED_STREAMED if job.streamed else _PACKED_TOKENS) + 1))
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
    result = compare_loaded(
        job.mlx_path, model.parameters(), text_only=text_only, drop=job.streamed
    )
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
    """Check that the runtime's tokenizer makes the reference's ids of every text.

    Conversations are a row of their own where the runtime is known to write them its own way, or
    not to write them at all.
    """
    kind = (model.name, str(model.config.get("model_type")))
    own = OWN_TEMPLATES.get(kind)
    cases: list[CaseResult] = []
    spoken: list[CaseResult] = []
    try:
        for question in questions:
            expected = question.tokenized
            if expected is None:
                continue
            try:
                made = model.tokenize(question.case)
            except RuntimeRefusal:
                if not question.case.messages or kind not in UNSPOKEN:
                    raise
                made, own = [], UNSPOKEN[kind]
            differ = float(different_ids(expected, made))
            where = spoken if own and question.case.messages else cases
            where.append(CaseResult(question.case.name, differ, {"tokens": len(expected)}))
    except RuntimeRefusal as error:
        found.refused("tokens", "tokens", error)
        return
    if spoken:
        differing = float(sum(case.value for case in spoken))
        found.checks.append(
            Check(
                name="deviation",
                modality="tokens",
                runtime=model.name,
                value=differing,
                verdict="info",
                note=str(own),
                cases=tuple(spoken),
            )
        )
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
            note="token ids of both libraries, conversations through the chat template "
            + ("left out" if spoken else "included"),
            cases=tuple(cases),
        )
    )
