"""What the torch reference answers to every prompt, gathered before the runtime is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from validate.cases import MEDIA, MEDIA_FILES, TEXT_FILES, Case, bounded, byte_ids, load_cases
from validate.processor import load_tokenizer, media_inputs, tokenize
from validate.reference import Greedy, Logits, TorchReference, read_config
from validate.where.row import STEPS, TOKENS, Traced
from validate.where.torch_trace import trace_reference
from validate.where.trace import MOST, MOST_OF_MEDIA

GREEDY_TOKENS: Final = 12
GREEDY_MEDIA_TOKENS: Final = 4
"""Fewer, because the reference recomputes the whole sequence for each."""


_ASKED: Final = {("gemma3n", "image"): 1}
"""How many pictures to ask about, where all are made one size and each takes minutes on a CPU."""


@dataclass(frozen=True)
class Question:
    """One prompt as the model takes it."""

    case: Case
    ids: tuple[int, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Everything the processor made of a picture or a sound and its question; empty for text."""
    tokenized: tuple[int, ...] | None = None
    """The uncut ids from the release's tokenizer; None when it has none."""
    borrowed: bool = False
    """Whether ``inputs`` are a runtime's, because the release's processor cannot run here."""


@dataclass(frozen=True)
class Answer:
    """The reference's float32 answer to one question."""

    question: Question
    logits: Logits
    greedy: Greedy


@dataclass(frozen=True)
class Answers:
    """All answers, and how other computations of the same prompts came out."""

    exact: tuple[Answer, ...]
    """From the weights the output must reproduce, in float32."""
    original: tuple[Logits, ...] = ()
    """From the unquantized source in float32, where that differs from ``exact``."""
    noisy: tuple[Logits, ...] = ()
    """As ``exact``, computed in the output's 16-bit dtype."""
    traced: Mapping[str, Traced] = field(default_factory=dict)
    """What went through the modules for one question of each modality."""


def text_questions(
    source: Path, *, vocab_size: int, files: Sequence[str] = TEXT_FILES, trust_remote_code: bool
) -> list[Question]:
    """Token ids of the fixed prompts; conversations only where there is a chat template."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    questions = []
    for case in load_cases(*files):
        if tokenizer is None:
            full = None if case.messages else byte_ids(case.text, vocab_size=vocab_size)
        else:
            full = tokenize(tokenizer, case)
        if full:
            ids = tuple(bounded(full, vocab_size=vocab_size))
            questions.append(Question(case, ids, tokenized=tuple(full) if tokenizer else None))
    return questions


def media_questions(
    source: Path, modality: str, *, trust_remote_code: bool, most: int | None = None
) -> list[Question]:
    """The fixed questions about generated pictures or sounds, through the release's processor.

    ``most``: only the first of them.
    """
    questions = []
    asked = most or _ASKED.get((str(read_config(source).get("model_type")), modality))
    for case in load_cases(MEDIA_FILES[modality])[:asked]:
        inputs = media_inputs(source, case, trust_remote_code=trust_remote_code)
        ids = tuple(int(token) for token in inputs["input_ids"][0])
        questions.append(Question(case, ids, inputs=inputs))
    return questions


def answer(
    model: TorchReference, questions: Sequence[Question], progress: Callable[[str], None]
) -> tuple[Answer, ...]:
    """Logits and a greedy continuation for every question."""
    result = []
    for question in questions:
        progress(f"torch: {question.case.modality} {question.case.name}")
        if question.inputs:
            logits = model.forward(question.inputs)
            greedy = model.greedy_from(question.inputs, GREEDY_MEDIA_TOKENS)
        else:
            logits = model.logits(question.ids)
            greedy = model.greedy(question.ids, GREEDY_TOKENS)
        result.append(Answer(question, logits, greedy))
    return tuple(result)


def trace_questions(
    model: TorchReference, answers: Sequence[Answer], progress: Callable[[str], None]
) -> dict[str, Traced]:
    """The reference's modules on the first plain text, picture and sound that it answered.

    A text goes on by the tokens it was answered with, which the runtime is fed one by one.
    """
    found: dict[str, Traced] = {}
    for index, item in enumerate(answers):
        modality = item.question.case.modality
        if modality in found or modality not in ("text", *MEDIA):
            continue
        progress(f"torch: modules, {modality}")
        inputs: Mapping[str, Any]
        prompt, more = len(item.question.ids), item.greedy.tokens[:0]
        apart = bool(model.answer_so_far(()))
        if item.question.inputs:
            inputs = item.question.inputs
        else:
            prompt, more = min(prompt, TOKENS), item.greedy.tokens[:STEPS]
            asked = item.question.ids[:prompt]
            inputs = model.text_inputs(asked if apart else [*asked, *more])
        try:
            whole = {**model.cast(inputs), **model.answer_so_far(more)}
            media = bool(item.question.inputs)
            reference = trace_reference(
                model.model,
                model.folder,
                whole,
                most=MOST_OF_MEDIA if media else MOST,
                bearing=media,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            progress(f"torch: modules cannot be traced: {error}")
            continue
        rows = 1 if apart else None
        found[modality] = Traced(index, prompt, len(more), reference, rows)
    return found


def only_logits(model: TorchReference, questions: Sequence[Question]) -> tuple[Logits, ...]:
    """Logits alone, in the order of ``questions``."""
    return tuple(
        model.forward(question.inputs) if question.inputs else model.logits(question.ids)
        for question in questions
    )
