"""Prompts of unequal lengths in one batch: as the reference gives each alone, or said why not."""

import numpy as np
import pytest

from converter.pipeline import Request, convert
from converter.ui import Console
from validate.answers import answer, text_questions
from validate.batched import batch_check
from validate.cases import TEXT_FILES
from validate.checks import EXACT
from validate.reference import TorchReference
from validate.runtime import MlxRuntime


@pytest.fixture(scope="module")
def judged(twin_of, runtimes, tmp_path_factory):
    """A runtime's model and the reference's answers, by type and runtime."""
    root = tmp_path_factory.mktemp("batched")

    def get(model_type: str, runtime: str):
        source, out = twin_of(model_type), root / model_type
        if not out.exists():
            convert(Request(hf_path=str(source), mlx_path=out), Console(quiet=True))
        reference = TorchReference.load(source)
        questions = text_questions(
            source,
            vocab_size=reference.vocab_size,
            files=TEXT_FILES[:1],
            trust_remote_code=False,
        )
        answers = answer(reference, questions, lambda text: None)
        model = MlxRuntime.load(out, runtime=runtime)
        model.to_float32(dense=False)
        return model, answers

    return get


@pytest.mark.parametrize("runtime", ["mlx_vlm", "mlx_lm"])
def test_rows_of_a_batch_are_as_alone(judged, runtime):
    model, answers = judged("cohere2", runtime)  # layers with and without a window
    (row,) = batch_check(model, answers)
    assert (row.verdict, row.threshold) == ("pass", EXACT)
    assert len({case.metrics["tokens"] for case in row.cases}) == 3


def test_padding_that_a_runtime_gets_wrong_is_told_from_a_wrong_checkpoint(judged):
    model, answers = judged("mamba", "mlx_lm")
    (row,) = batch_check(model, answers)
    assert row.verdict == "info"
    assert row.value > EXACT
    assert row.cases[-1].value <= EXACT, "the longest row has no padding"
    assert "recurrent layers take no mask" in row.note
    model.model.update({"backbone": {"norm_f": {"weight": model.model.backbone.norm_f.weight + 1}}})
    (row,) = batch_check(model, answers)
    assert row.verdict == "info"
    assert "see the rows of single prompts" in row.note


def test_what_a_runtime_refuses_is_said_in_its_words(judged):
    model, answers = judged("gemma2", "mlx_lm")
    (row,) = batch_check(model, answers)
    assert (row.verdict, row.value) == ("info", None)
    assert "mlx_lm cannot run" in row.note


def test_a_cut_prompt_has_the_reference_s_logits_of_its_place(judged):
    from validate.batched import _Row

    model, answers = judged("qwen3", "mlx_lm")
    row = _Row.cut(answers[0], 10)
    assert row.ids == answers[0].question.ids[:10]
    assert row.tokens == answers[0].question.ids[10:16]
    alone = model.continued(row.ids, row.tokens).steps
    assert np.abs(alone - row.wanted).max() < EXACT * np.abs(row.wanted).max()
