"""The reference block by block: every weight is read once for all prompts together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

import numpy as np

from quant.calibrate.loading import without_weights
from quant.calibrate.stream import BlockError, StreamedModel
from quant.calibrate.text import CalibrationError
from validate.answers import Answer, Question
from validate.reference import (
    Greedy,
    Logits,
    ReferenceError,
    TorchReference,
    borrowed_settings,
    model_class,
    read_config,
)
from validate.stand_ins import stand_in
from validate.streamed.tables import Head, by_rows, tables
from validate.streamed.tensors import Tensors
from validate.torch_faults import complete, lighten, mend

GREEDY_TOKENS: Final = 4
"""Tokens of a greedy continuation; each costs one more pass over all weights."""
_REST: Final = (
    "needs a machine whose memory holds it in float32; there, --memory-limit with that size "
    "judges it whole"
)


class StreamedReference(TorchReference):
    """A transformers model that holds the weights of one block at a time, in float32."""

    streamed: StreamedModel
    head: Head | None

    @classmethod
    def open(
        cls, tensors: Tensors, *, round_to: str | None = None, trust_remote_code: bool = False
    ) -> Self:
        """Build the model of ``tensors``; its parameters are rounded to the dtype ``round_to``.

        Raises ReferenceError where it cannot be built or run block by block, or lacks a tensor.
        """
        import torch

        folder = tensors.folder
        with _explained():
            model = without_weights(lambda: _build(tensors, trust_remote_code), folder)
            lighten(model)
            large = tables(model)
            streamed = StreamedModel(
                folder, tensors.reader, tensors.shapes, model=model, apart=large
            )
        lost = [
            name
            for name in streamed.weights.names
            if streamed.weights.tied.get(name, name) not in streamed.weights.group_of
        ]
        if lost:
            raise ReferenceError(
                f"{folder}: {len(lost)} parameters of {type(model).__name__} have no weights in "
                f"the checkpoint, so it would compute with random ones: {', '.join(lost[:5])}"
            )
        if round_to is not None:
            streamed.weights.rounding = getattr(torch, round_to)
        complete(model)
        found = cls(model, folder=folder, dtype="float32", trust_remote_code=trust_remote_code)
        found.streamed = streamed
        found.head = by_rows(streamed, large)
        return found

    def close(self) -> None:
        """Drop the model."""
        del self.streamed, self.head
        super().close()

    def answers(
        self, questions: Sequence[Question], progress: Callable[[str], None]
    ) -> tuple[Answer, ...]:
        """Logits and a greedy continuation of ``GREEDY_TOKENS`` for every question.

        What is asked, and how, is what the whole model is asked; text with a cache, from which the
        prompt's logits are taken as well.
        """
        rows = [_Row(self, question) for question in questions]
        for step in range(GREEDY_TOKENS):
            open_rows = [row for row in rows if not row.ended]
            if not open_rows:
                break
            progress(f"torch: block by block, pass {step + 1} of at most {GREEDY_TOKENS}")
            outputs = self._outputs([row.inputs for row in open_rows])
            for row, output in zip(open_rows, outputs, strict=True):
                row.take(output)
        return tuple(row.answer() for row in rows)

    def all_logits(self, questions: Sequence[Question]) -> tuple[Logits, ...]:
        """Logits alone, in the order of ``questions``, in one pass."""
        inputs = [self.cast(q.inputs or self.text_inputs(q.ids)) for q in questions]
        return tuple(_numpy(output.logits[0]) for output in self._outputs(inputs))

    def _outputs(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """What the model answers to each row, in one pass over the weights."""
        streamed = self.streamed
        with _explained(), streamed.run(rows, threads=None) as run:
            for index in range(len(streamed.blocks)):
                with streamed.loaded(index):
                    run.forward(index, keep=True)
            if self.head is not None:
                index = len(streamed.blocks)
                run.answer(index, self.head.project(list(run.inputs(index))))
            found = list(run.results())
        streamed.release_rest()
        return found


class _Row:
    """One question on its way through the passes, as ``TorchReference.greedy_from`` goes."""

    def __init__(self, model: StreamedReference, question: Question) -> None:
        self._model = model
        self._question = question
        self._whole = dict(model.cast(question.inputs or model.text_inputs(question.ids)))
        self._cached = model.steps_with_cache(self._whole)
        self.inputs: dict[str, Any] = {**self._whole, "use_cache": self._cached}
        self.ended = False
        self._logits: Logits | None = None
        self._tokens: list[int] = []
        self._rows: list[Logits] = []

    def take(self, output: Any) -> None:
        """What the model answered to ``inputs``; sets those of the next step."""
        if self._logits is None:
            self._logits = _numpy(output.logits[0])
        self._rows.append(_numpy(output.logits[0, -1]))
        token = int(self._rows[-1].argmax())
        self._tokens.append(token)
        self.ended = self._model.ends(token)
        kept = self._model.kept_by(output)
        self._cached = self._cached and bool(kept)
        if self._cached:
            ids = self._model.text_inputs([token])["input_ids"]
            self.inputs = {"input_ids": ids, **kept, "use_cache": True}
        else:
            self._whole = self._model.extended(self._whole, token)
            self.inputs = self._whole

    def answer(self) -> Answer:
        """All of it; the row must have been through the first pass."""
        assert self._logits is not None
        greedy = Greedy(tokens=tuple(self._tokens), logits=np.stack(self._rows))
        return Answer(self._question, self._logits, greedy)


def _build(tensors: Tensors, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    folder = tensors.folder
    auto, config = model_class(folder), read_config(folder)
    mend(str(config.get("model_type")))
    other = stand_in(config)
    if other is not None and other.names:
        raise BlockError("its class in transformers goes by other names for the tensors")
    settings = borrowed_settings(auto, config)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    own = getattr(auto, "config_class", None) or transformers.AutoConfig
    built = settings.get("config") or own.from_pretrained(folder, **options)
    if hasattr(auto, "_from_config"):
        model = auto._from_config(built, dtype=torch.float32)
    else:
        model = auto.from_config(built, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if model.config.is_encoder_decoder:
        raise BlockError(f"{type(model).__name__} has an encoder beside its decoder")
    if hasattr(model, "thinker"):
        raise BlockError(f"{type(model).__name__} speaks as well as it answers")
    return model


@contextmanager
def _explained() -> Iterator[None]:
    """Say of what cannot be streamed why, and what it takes."""
    try:
        yield
    except BlockError as error:
        raise ReferenceError(
            f"it cannot be judged block by block: {error.reason}. It {_REST}"
        ) from error
    except CalibrationError as error:
        raise ReferenceError(str(error)) from error


def _numpy(tensor: Any) -> Logits:
    array: Logits = tensor.detach().float().cpu().numpy()
    return array
