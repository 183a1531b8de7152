"""Prompts of unequal lengths in one batch, through the runtimes' own batch generators.

The generators pad, mask, split prompts into chunks and keep batch caches, as their servers do. Each
row must give the logits that the reference gives its prompt alone: padding and neighbours have no
bearing on it. The reference's tokens are put in place of those that the runtime would choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from validate.answers import Answer
from validate.batch_faults import batch_fault
from validate.cases import MEDIA
from validate.checks import EXACT, CaseResult, Check, Verdict, at_most
from validate.gates import compared_logits
from validate.runtime import Logits, MlxRuntime, RuntimeRefusal, refusals, word_count

CHUNK: Final = 48
"""Tokens of a prompt that are run at once: the longer of the fixed prompts are split."""
_TOKENS: Final = 6
"""Tokens of each answer: the first behind the prompts, the others from the batch's cache."""
NAME: Final = "batch"
_BATCHES: Final = (
    "The same texts cut to one length part in a batch as well: see the rows of single prompts for "
    "whether the checkpoint is to blame, or the runtime's batches"
)


@dataclass(frozen=True)
class _Row:
    """A prompt, the tokens that follow it, and the reference's logits of each."""

    name: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    wanted: Logits

    @classmethod
    def of(cls, item: Answer) -> _Row:
        """The prompt with the first tokens of its answer."""
        tokens = item.greedy.tokens[:_TOKENS]
        wanted = item.greedy.logits[: len(tokens)]
        return cls(item.question.case.name, item.question.ids, tokens, wanted)

    @classmethod
    def cut(cls, item: Answer, length: int) -> _Row:
        """The first ``length`` tokens of the prompt, with those that follow in it or behind it."""
        ids = (*item.question.ids, *item.greedy.tokens)
        logits = np.concatenate([item.logits, item.greedy.logits[1:]])
        end = length + _TOKENS
        name = item.question.case.name
        return cls(name, ids[:length], ids[length:end], logits[length - 1 : end - 1])


def batch_check(model: MlxRuntime, answers: Sequence[Answer]) -> list[Check]:
    """The row on the shortest, the middle and the longest text in one batch.

    None of a decoder beside an encoder, and none where all texts have one length. Where rows part
    from the reference, the same prompts are run cut to one length, which tells padding from batches
    as such. The row never fails: every prompt of it is gated alone, by the logits and decode rows,
    and what a batch adds is the runtime's doing, in which no checkpoint has a part.
    """
    texts = [item for item in answers if item.question.case.modality not in MEDIA]
    ordered = sorted(texts, key=lambda item: len(item.question.ids))
    lengths = {len(item.question.ids) for item in texts}
    if len(lengths) < 2 or any(len(a.logits) != len(a.question.ids) for a in texts):
        return []
    chosen = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    shown = ", ".join(str(len(item.question.ids)) for item in chosen)
    note = f"texts of {shown} tokens in one batch, {CHUNK} tokens at a time"
    rows = [_Row.of(item) for item in chosen]
    try:
        cases = _compare(model, rows)
        value = max(case.value for case in cases)
        verdict: Verdict = at_most(value, EXACT)
        if verdict == "fail":
            cut = [_Row.cut(item, len(ordered[0].question.ids)) for item in chosen]
            alike = max(case.value for case in _compare(model, cut)) <= EXACT
            verdict, note = "info", f"{note}. {_padding(model) if alike else _BATCHES}"
    except RuntimeRefusal as error:
        return [Check(NAME, "text", "info", runtime=model.name, note=f"{note}: {error}")]
    return [
        Check(
            NAME,
            "text",
            verdict,
            runtime=model.name,
            value=value,
            threshold=EXACT,
            note=note,
            cases=cases,
        )
    ]


def _padding(model: MlxRuntime) -> str:
    library = model.name.replace("_", "-")
    why = batch_fault(model.name, str(model.config.get("model_type")))
    return (
        f"{library} computes rows with padding otherwise{f': {why}' if why else ''}. The same "
        "texts cut to one length are right in a batch, so that no weight or setting is to blame"
    )


def _compare(model: MlxRuntime, rows: Sequence[_Row]) -> tuple[CaseResult, ...]:
    found = batched(model, [row.ids for row in rows], [row.tokens for row in rows])
    return tuple(
        CaseResult(row.name, compared_logits(row.wanted, logits).relative, {"tokens": len(row.ids)})
        for row, logits in zip(rows, found, strict=True)
    )


def batched(
    model: MlxRuntime, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Logits]:
    """The logits that each token of ``answers`` is chosen from, [tokens, vocabulary] for each row.

    RuntimeRefusal where the runtime cannot run the model so.
    """
    dictated = [_Dictated(answer) for answer in answers]
    with refusals(model.name, model.folder):
        generate = _by_mlx_lm if model.name == "mlx_lm" else _by_mlx_vlm
        generate(model.model, [list(ids) for ids in prompts], dictated)
        return [one.logits()[:, : word_count(model.config)] for one in dictated]


class _Dictated:
    """A processor of logits that notes them and leaves one token to choose."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._rows: list[Any] = []

    def __call__(self, context: Any, logits: Any) -> Any:
        import mlx.core as mx

        at = len(self._rows)
        if at >= len(self.tokens):  # a step ahead of the last token
            return logits
        self._rows.append(logits.reshape(-1).astype(mx.float32))
        chosen = mx.arange(logits.shape[-1]) == self.tokens[at]
        return mx.where(chosen, 0.0, -1e9).reshape(logits.shape).astype(logits.dtype)

    def logits(self) -> Logits:
        """What was noted, [tokens, vocabulary]."""
        return np.stack([np.array(row) for row in self._rows])


def _by_mlx_lm(model: Any, prompts: list[list[int]], dictated: Sequence[_Dictated]) -> None:
    library: Any = import_module("mlx_lm.generate")
    generator = library.BatchGenerator(model, prefill_step_size=CHUNK)
    generator.insert(
        prompts,
        max_tokens=[len(one.tokens) for one in dictated],
        logits_processors=[[one] for one in dictated],
    )
    _finish(generator, prompts, dictated)


def _by_mlx_vlm(model: Any, prompts: list[list[int]], dictated: Sequence[_Dictated]) -> None:
    library: Any = import_module("mlx_vlm.generate.ar")
    endless = _Endless()
    generator = library.BatchGenerator(
        model.language_model,
        SimpleNamespace(stopping_criteria=endless),
        prefill_batch_size=len(prompts),
        completion_batch_size=len(prompts),
        prefill_step_size=CHUNK,
        compute_logprobs=False,
    )
    generator.insert(
        prompts,
        [len(one.tokens) for one in dictated],
        prompt_kwargs=[_embedded(model, ids) for ids in prompts],
        logits_processors=[[one] for one in dictated],
    )
    _finish(generator, prompts, dictated)


def _embedded(model: Any, ids: Sequence[int]) -> Mapping[str, Any]:
    import mlx.core as mx

    row = mx.array([list(ids)], dtype=mx.int32)
    made = model.get_input_embeddings(row, None, mask=mx.ones_like(row)).to_dict()
    return {name: value for name, value in made.items() if value is not None}


class _Endless:
    """Stopping criteria under which no token ends an answer."""

    def add_eos_token_ids(self, tokens: Any) -> None:
        """Take no notice."""

    def __call__(self, token: int) -> bool:
        return False


def _finish(generator: Any, prompts: Sequence[Any], dictated: Sequence[_Dictated]) -> None:
    left = len(prompts)
    steps = left + sum(map(len, prompts)) + sum(len(one.tokens) for one in dictated)
    try:
        for _ in range(steps):  # one a token would be more than it takes
            _, responses = generator.next()
            left -= sum(response.finish_reason is not None for response in responses)
            if not left:
                return
        raise RuntimeError("its batch generator does not end")
    finally:
        generator.close()
