"""Florence-2: a decoder that answers what an encoder has read, against transformers' generation."""

import numpy as np
import pytest

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find
from validate.answers import media_questions, text_questions
from validate.reference import TorchReference
from validate.twin import load_example


@pytest.fixture(scope="module")
def reference(twin_of):
    return TorchReference.load(twin_of("florence2"), trust_remote_code=False)


def generated(model, inputs, count):
    """The logits of every step of transformers' own greedy generation."""
    import torch

    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            decoder_start_token_id=model.config.text_config.decoder_start_token_id,
            eos_token_id=None,
            forced_bos_token_id=None,
            forced_eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return np.stack([step[0].numpy() for step in out.logits])


def test_steps_of_the_reference_are_those_of_generation(reference, twin_of):
    folder = twin_of("florence2")
    text = text_questions(folder, vocab_size=reference.vocab_size, trust_remote_code=False)[0]
    image = media_questions(folder, "image", trust_remote_code=False)[0]
    for inputs in (reference.text_inputs(text.ids), image.inputs):
        steps = reference.greedy_from(inputs, 5)
        expected = generated(reference.model, inputs, 5)
        assert np.abs(steps.logits - expected).max() < 1e-5 * np.abs(expected).max()
        first = reference.forward(inputs)
        assert first.shape == (1, reference.vocab_size)
        assert np.abs(first[0] - expected[0]).max() < 1e-5 * np.abs(expected).max()


def test_the_answer_depends_on_what_the_encoder_reads(reference):
    one, other = reference.logits([7, 8, 9]), reference.logits([7, 9, 8])
    assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


def test_both_generations_of_names_fill_the_same_parameters():
    arch, shapes = find("florence2"), []
    for layout in arch.layouts:
        facts = Facts(load_example("florence2"))
        rules = arch.expand(facts, layout).rules
        assert facts.problems == []
        shapes.append({rule.target: rule.expr.shape for rule in rules})
        names = {leaf.name for rule in rules for leaf in sources(rule.expr)}
        assert len(names) == len(rules) - 1  # the head is the vocabulary
    assert shapes[0] == shapes[1]
