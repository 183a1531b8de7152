"""NVIDIA's omni releases: two spellings of one tower, names as counted, pictures in patches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arch_maps.facts import Facts
from arch_maps.ops import sources
from arch_maps.registry import find, map_name
from arch_maps.vision import radio
from converter.errors import PlanError
from converter.pipeline import Request, convert
from converter.ui import Console
from validate.arrays import to_torch
from validate.metrics import relative_error
from validate.pixels import compare_pixels
from validate.reference import TorchReference
from validate.runtime import MlxRuntime
from validate.twin import load_example
from validate.watching import video_questions

TYPE = "nemotron_h_omni"
SCALE = "vision_model.radio_model.model.blocks.{}.layer_scale{}.lambda1"


def expanded(example):
    arch, facts = find(TYPE), Facts(load_example(example))
    tensors = arch.expand(facts, arch.layouts[0])
    assert facts.problems == []
    names = {leaf.name for rule in tensors.rules for leaf in sources(rule.expr)}
    return names, {drop.name for drop in tensors.drops}


def test_the_first_release_names_itself_otherwise():
    assert load_example(TYPE)["model_type"] == "NemotronH_Nano_Omni_Reasoning_V3"
    assert map_name(load_example(TYPE)) == TYPE


def test_the_text_stack_has_as_many_names_as_the_release_of_text_alone():
    """Nemotron 3 Super's index has 42,683 names, each of which the omni release has too."""
    names, drops = expanded(f"{TYPE}:super-vl")
    text = {name for name in names | drops if name.startswith("language_model.")}
    assert len(text) == 42_683
    mtp = {name.removeprefix("language_model.mtp.layers.") for name in text if ".mtp." in name}
    assert {"0.enorm.weight", "0.hnorm.weight", "0.eh_proj.weight", "0.mixer.q_proj.weight"} <= mtp
    assert {"1.mixer.experts.511.up_proj.weight", "1.final_layernorm.weight"} <= mtp
    assert len(mtp) == 1040


def test_only_a_release_that_predicts_further_tokens_norms_what_it_sees():
    norm = "vision_projector.vision_final_layernorm.weight"
    assert norm in expanded(f"{TYPE}:super-vl")[0]
    assert norm not in expanded(TYPE)[0]


@pytest.mark.parametrize("example", [TYPE, f"{TYPE}:super-vl"])
def test_the_runtime_counts_the_tokens_of_either_spelling(example, runtimes):
    from mlx_vlm.models.nemotron_h_nano_omni import ModelConfig, VisionModel

    config = load_example(example)
    found = find(TYPE).config(config, Facts(config))
    vision = ModelConfig.from_dict(found).vision_config
    vision.num_hidden_layers = 0
    patches = VisionModel(vision).radio_model.model.patch_generator
    assert patches.num_skip == 10
    assert patches.num_cls_tokens == found["vision_config"]["num_cls_tokens"]
    assert patches.pos_embed.shape == (1, 128 * 128, 1280)


@pytest.mark.parametrize(("tokens", "registers"), [(1, 0), (1, 7), (4, 6), (5, 5), (3, 0)])
def test_spelling_a_tower_and_reading_it_again_keeps_its_tokens(tokens, registers):
    section: dict = {}
    radio.spell_config(section, Facts({"num_cls_tokens": tokens, "num_registers": registers}))
    read = radio.filled(Facts({"args": section["args"]})).data
    assert (read["num_cls_tokens"], read["num_registers"]) == (tokens, registers)


def test_a_tower_of_unknown_size_is_a_problem():
    facts = Facts({"args": {"model": "vit_giant"}})
    radio.filled(facts)
    assert "args.model is 'vit_giant'" in facts.problems[0]


def resaved(twin: Path, out: Path, scale: float) -> Path:
    """The twin as transformers saves it, with layer scales and without pixel statistics."""
    shutil.copytree(twin, out)
    weights = load_file(out / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "input_conditioner" not in name}
    scales = {SCALE.format(b, n): np.ones(64, np.float32) for b in (0, 1) for n in (1, 2)}
    scales[SCALE.format(1, 2)][-1] = scale
    indices = {"vision_model.summary_idxs": np.array([0, 1])}
    save_file(kept | scales | indices, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_layer_scales_are_left_out_where_they_are_one(twin_of, tmp_path):
    twin = twin_of(f"{TYPE}:super-vl")
    ours = tmp_path / "ours"
    source = resaved(twin, tmp_path / "ones", 1.0)
    convert(Request(hf_path=str(source), mlx_path=ours), Console(quiet=True))
    manifest = json.loads((ours / "conversion.json").read_text())
    assert len(manifest["drops"]) == 5
    means = load_file(ours / "model.safetensors")[
        "vision_model.radio_model.input_conditioner.norm_mean"
    ]
    assert np.array(means).ravel().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_layer_scales_that_multiply_are_refused(twin_of, tmp_path):
    source = resaved(twin_of(f"{TYPE}:super-vl"), tmp_path / "scaled", 0.5)
    name = SCALE.format(1, 2)
    with pytest.raises(PlanError, match=f"not constant: {name} is left out because it is 1"):
        convert(Request(hf_path=str(source), mlx_path=tmp_path / "out"), Console(quiet=True))


def test_pictures_become_the_patches_that_the_reference_takes():
    """Two pictures of 2 x 4 and 4 x 2 patches of 16 x 16 pixels, each value its place in both."""
    shapes = ((32, 64), (64, 32))
    pictures = [np.random.default_rng(rows).random((3, rows, columns)) for rows, columns in shapes]
    made = to_torch(
        {"pixel_values": pictures, "num_tokens": np.array([2, 2]), "imgs_sizes": np.array(shapes)}
        | {"num_patches": np.array([1, 1])}
    )
    assert made.keys() == {"pixel_values", "image_grid_hw"}
    assert made["image_grid_hw"].tolist() == [[2, 4], [4, 2]]
    assert made["pixel_values"].shape == (16, 768)
    patch = made["pixel_values"][8 + 3 * 2 + 1].reshape(3, 16, 16)
    assert np.array_equal(patch.numpy(), pictures[1][:, 48:64, 16:32])
    error, layout = compare_pixels(made["pixel_values"][:8], pictures[0])
    assert (error, layout) == (0.0, "cut into patches, channel by channel")


def test_both_sides_leave_out_the_same_tokens_of_a_video(twin_of, runtimes, tmp_path):
    twin, out = twin_of(TYPE), tmp_path / "out"
    convert(Request(hf_path=str(twin), mlx_path=out), Console(quiet=True))
    (question,), _ = video_questions(out, source=twin)
    wanted = TorchReference.load(twin).forward(question.inputs)
    model = MlxRuntime.load(out, runtime="mlx_vlm")
    frames = question.ids.count(model.config["image_token_id"])
    assert len(question.ids) - len(wanted) == frames - int(frames * 0.75) > 0
    found = model.run(model.media_inputs(question.case)).prefill
    assert relative_error(wanted, found) < 1e-4
