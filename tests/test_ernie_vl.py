"""ERNIE 4.5 VL: experts for pictures, routers that lie on their side, a tokenizer of pieces."""

import json

import numpy as np
import pytest
from release_helpers import make, stored
from safetensors.numpy import load_file

from arch_maps.facts import Facts
from arch_maps.registry import find
from validate.cases import Case
from validate.metrics import relative_error
from validate.processor import media_inputs
from validate.reference import TorchReference
from validate.runtime import MlxRuntime
from validate.twin import load_example

TYPE = "ernie4_5_moe_vl"
ARCH = find(TYPE)


def problems_of(**changed):
    config = load_example(TYPE) | changed
    facts = Facts(config)
    ARCH.expand(facts, ARCH.layouts[0])
    ARCH.config(config, facts)
    return facts.problems


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"moe_num_experts": [64, 32]}, "as many experts for pictures as for text"),
        ({"head_dim": 64}, "must be hidden_size (2560)"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, "theirs are equal"),
        ({"rope_scaling": {"mrope_section": [16, 16, 16]}}, "the three make half of a head"),
        ({"rms_norm_eps": 1e-6}, "the runtime's resampler has it in code"),
        ({"spatial_conv_size": 4}, "patches are in the order of those that are joined"),
        ({"use_temporal_conv": False}, "the reference always joins frames"),
    ],
)
def test_what_neither_side_computes_is_a_problem(changed, problem):
    assert any(problem in found for found in problems_of(**changed))


def test_numbers_may_stand_for_both_kinds_of_experts():
    """And a last layer beyond the stack, as releases state it, is the last of the stack."""
    assert problems_of(moe_num_experts=64, moe_intermediate_size=512) == []
    found = ARCH.config(load_example(TYPE), Facts(load_example(TYPE)))
    assert (found["moe_layer_start_index"], found["moe_layer_end_index"]) == (1, 27)


@pytest.fixture(scope="module")
def converted(twin_of, tmp_path_factory):
    [folder] = make(twin_of(TYPE), tmp_path_factory.mktemp("ernie") / "out")
    return folder


def test_routers_are_turned_and_their_corrections_parted(twin_of, converted):
    source, found = load_file(twin_of(TYPE) / "model.safetensors"), stored(converted)
    at = "model.layers.2.mlp"
    both = source[f"{at}.moe_statics.e_score_correction_bias"]
    for kind, (router, end) in enumerate((("gate.weight", ""), ("gate.weight_1", "_1"))):
        turned = source[f"{at}.{router}"].T
        np.testing.assert_array_equal(found[f"language_model.{at}.gate{end}.weight"], turned)
        correction = found[f"language_model.{at}.e_score_correction_bias{end}"]
        np.testing.assert_array_equal(correction, both[kind])
        down = source[f"{at}.experts.{8 * kind + 3}.down_proj.weight"]
        stack = found[f"language_model.{at}.switch_mlp{end}.down_proj.weight"]
        np.testing.assert_array_equal(stack[3], down)


def test_both_sides_read_and_see_alike_once_pictures_have_their_experts(
    twin_of, converted, runtimes
):
    from validate.deviations import deviations_for

    twin = twin_of(TYPE)
    reference, model = TorchReference.load(twin), MlxRuntime.load(converted, runtime="mlx_vlm")
    model.to_float32(dense=True)
    ids = list(range(20, 60))
    assert relative_error(reference.logits(ids), model.logits(ids)) < 1e-5
    case = Case(name="seen", modality="image", text="What is it?", width=120, height=90)
    asked, given = media_inputs(twin, case), model.media_inputs(case)
    assert asked["input_ids"].tolist() == given["input_ids"].tolist()
    pixels = given["pixel_values"]
    np.testing.assert_allclose(np.array(pixels), asked["pixel_values"].numpy(), atol=1e-5)
    wanted = reference.forward(asked)
    assert relative_error(wanted, model.run(given).prefill) > 0.05
    known = deviations_for("mlx_vlm", model_type=TYPE, modality="image")
    with model.without(known, source=twin):
        assert relative_error(wanted, model.run(given).prefill) < 1e-5
        marked = json.loads((converted / "config.json").read_text())["image_end_token_id"]
        assert marked in asked["input_ids"].tolist()[0]


def test_the_twins_tokenizer_is_the_same_by_pieces_and_by_tokens(twin_of, runtimes):
    from mlx_vlm.models.ernie4_5_moe_vl import Ernie4_5_VLTokenizer
    from tokenizers import Tokenizer

    twin = twin_of(TYPE)
    pieces = Ernie4_5_VLTokenizer.from_pretrained(twin)
    tokens = Tokenizer.from_file(str(twin / "tokenizer.json"))
    for text in ("The quiet harbour", "a  b\n", "<|im_start|>user ü<|IMAGE_END|>"):
        assert pieces.encode(text) == tokens.encode(text).ids
