import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from twin_helpers import TYPES, first_output, ids, torch_model

from arch_maps.dtypes import itemsize
from arch_maps.registry import map_name, model_types
from validate.twin import (
    Sizes,
    TwinError,
    list_examples,
    list_variants,
    load_example,
    make_twin,
    twin_from,
)
from validate.twin.families import FAMILIES
from validate.twin.layers import select_layers
from validate.twin.shrink import shrink_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    return {name: make_twin(load_example(name), root / name) for name in TYPES}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


# Examples


def test_every_type_has_an_example_and_only_those():
    assert list_examples() == tuple(sorted(model_types()))
    assert set(TYPES) <= set(list_examples())
    assert set(FAMILIES) <= set(list_examples())


@pytest.mark.parametrize("name", TYPES)
def test_example_is_a_config_transformers_reads(name, tmp_path):
    from transformers import AutoConfig

    config = load_example(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).model_type == config["model_type"]
    assert map_name(config) == name


def test_unknown_example_names_the_nearest():
    with pytest.raises(TwinError, match=r"no example config for model type 'qwen3_6'; did you me"):
        load_example("qwen3_6")
    with pytest.raises(TwinError, match="no example config"):
        load_example("../models")


def test_a_variant_is_an_example_beside_the_first(tmp_path, program):
    assert "llama:biased" in list_variants()
    assert "llama:biased" in list_variants("llama")
    assert not set(list_variants("llama")) & set(list_variants("qwen2"))
    assert load_example("llama:biased")["mlp_bias"] is True
    with pytest.raises(TwinError, match="did you mean llama:biased"):
        load_example("llama:biasd")
    subprocess.run([*program, "twin", "llama:biased", str(tmp_path / "twin")], check=True)
    made = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert made["attention_bias"] is True
    assert "model.layers.0.mlp.up_proj.bias" in load_file(tmp_path / "twin" / "model.safetensors")


# Layers and sizes


def test_uniform_stack_keeps_three_layers():
    assert select_layers(["a"] * 32) == (0, 1, 2)
    assert select_layers(["a"]) == (0,)
    assert select_layers([]) == ()


def test_periodic_stack_keeps_two_periods_with_runs_of_two():
    kinds = ["linear", "linear", "linear", "full"] * 6
    assert select_layers(kinds) == (0, 1, 3, 4, 5, 7)
    # A last period that is cut off does not hide the pattern.
    assert select_layers(kinds[:-1]) == (0, 1, 3, 4, 5, 7)


def test_irregular_stack_keeps_every_kind_in_order():
    kinds = ["dense"] * 3 + ["moe"] * 20 + ["last"]
    assert select_layers(kinds) == (0, 1, 3, 4, 23)


@pytest.mark.parametrize("name", TYPES)
def test_every_layer_kind_and_ratio_is_kept(name):
    source = load_example(name)
    shrunk, _ = shrink_config(source, FAMILIES[name])
    source, shrunk = source.get("text_config", source), shrunk.get("text_config", shrunk)
    assert set(shrunk.get("layer_types", [])) == set(source.get("layer_types", []))
    assert len(shrunk.get("layer_types", [])) in (0, shrunk["num_hidden_layers"])
    assert shrunk["num_hidden_layers"] >= 3
    for heads, groups in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if groups in source:
            assert (source[heads] == source[groups]) == (shrunk[heads] == shrunk[groups])
            assert shrunk[heads] % shrunk[groups] == 0
            assert shrunk[groups] > 1


def test_interval_follows_the_kept_layers():
    shrunk, _ = shrink_config(load_example("minicpmv4_6"), FAMILIES["minicpmv4_6"])
    text = shrunk["text_config"]
    assert text["full_attention_interval"] == 3
    expected = [
        "full_attention" if (i + 1) % 3 == 0 else "linear_attention"
        for i in range(text["num_hidden_layers"])
    ]
    assert text["layer_types"] == expected
    # Without the list, the interval alone gives the same layers.
    source = load_example("minicpmv4_6")
    del source["text_config"]["layer_types"]
    bare, _ = shrink_config(source, FAMILIES["minicpmv4_6"])
    assert bare["text_config"]["num_hidden_layers"] == 6
    assert bare["text_config"]["full_attention_interval"] == 3


def test_mixture_of_experts_keeps_its_dense_prefix_and_routing():
    source = load_example("qwen3") | {
        "first_k_dense_replace": 3,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoModel": "code.py--Model"},
    }
    shrunk, _ = shrink_config(source, FAMILIES["qwen3"])
    assert (shrunk["num_hidden_layers"], shrunk["first_k_dense_replace"]) == (4, 2)
    assert (shrunk["n_routed_experts"], shrunk["num_experts_per_tok"]) == (8, 2)
    assert shrunk["moe_intermediate_size"] == 192
    assert not {"quantization_config", "auto_map"} & set(shrunk)


def test_position_axes_share_the_rotary_frequencies():
    shrunk, _ = shrink_config(load_example("qwen3_5"), FAMILIES["qwen3_5"])
    rope = shrunk["text_config"]["rope_parameters"]
    assert rope["partial_rotary_factor"] == 0.5
    assert sum(rope["mrope_section"]) == shrunk["text_config"]["head_dim"] * 0.5 / 2
    assert all(part > 0 for part in rope["mrope_section"])


def test_shrinking_leaves_the_source_alone():
    source = load_example("qwen3_5")
    before = copy.deepcopy(source)
    shrink_config(source, FAMILIES["qwen3_5"])
    assert source == before


# Checkpoints


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_varies_and_is_finite(twins, name):
    weights = load_file(twins[name].path / "model.safetensors")
    assert len(weights) == twins[name].tensors
    for key, value in weights.items():
        assert np.isfinite(value).all(), key
        assert value.size == 1 or np.ptp(value) > 0.05 * abs(value).max(), key


@pytest.mark.parametrize("name", TYPES)
def test_linear_layers_can_be_quantized_in_groups_of_64(twins, name):
    model = torch_model(twins[name].path)
    import torch

    widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert widths
    assert {width % 64 for width in widths} == {0}


@pytest.mark.parametrize("name", TYPES)
def test_torch_runs_it_on_text(twins, name):
    model = torch_model(twins[name].path)
    output = first_output(model, input_ids=ids())
    assert output.isfinite().all()
    # The last position reads the first token: attention and state reach across the prompt.
    changed = ids()
    changed[0, 0] += 1
    other = first_output(model, input_ids=changed)
    assert (other[0, -1] - output[0, -1]).abs().max() > 1e-3 * output.abs().max()


def test_bytes_depend_on_config_and_seed_alone(tmp_path):
    script = (
        "import sys; from pathlib import Path; from validate.twin import *\n"
        "make_twin(load_example('minicpmv4_6'), Path(sys.argv[1]))"
    )
    for name, hash_seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)],
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "TOKENIZERS_PARALLELISM": "true"},
        )
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    make_twin(load_example("minicpmv4_6"), tmp_path / "c", seed=1)
    changed = {
        name
        for name, digest in hashes(tmp_path / "c").items()
        if digest != hashes(tmp_path / "a")[name]
    }
    assert changed == {"model.safetensors"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen3", ("rope_theta",)),
        ("qwen3", ("rms_norm_eps",)),
        ("llama", ("rope_scaling", "factor")),
        ("llama", ("rope_scaling", "low_freq_factor")),
        ("bert", ("layer_norm_eps",)),
        ("qwen3_5_text", ("rms_norm_eps",)),
        ("qwen3_5_text", ("rope_parameters", "rope_theta")),
        ("qwen3_5_text", ("rope_parameters", "partial_rotary_factor")),
    ],
)
def test_an_ignored_setting_shows(twins, name, path):
    import transformers

    config, source = copy.deepcopy(twins[name].config), load_example(name)
    holder, original = config, source
    for part in path[:-1]:
        holder, original = holder[part], original[part]
    assert holder[path[-1]] != original[path[-1]]
    holder[path[-1]] = original[path[-1]]
    model = torch_model(twins[name].path)
    other = type(model)(transformers.CONFIG_MAPPING[name].from_dict(config)).eval()
    other.load_state_dict(model.state_dict())
    right, wrong = first_output(model, input_ids=ids()), first_output(other, input_ids=ids())
    assert (right - wrong).abs().max() > 1e-3 * right.abs().max()


def test_shards_and_dtype(tmp_path):
    info = make_twin(
        load_example("qwen3"), tmp_path / "twin", dtype="bfloat16", max_shard_size="400KB"
    )
    index = json.loads((info.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == info.parameters * itemsize("BF16")
    assert info.config["torch_dtype"] == "bfloat16"
    assert "rope_parameters" not in info.config


def test_sizes_can_be_chosen(tmp_path):
    info = make_twin(
        load_example("llama"), tmp_path / "twin", sizes=Sizes(hidden=256, intermediate=320)
    )
    assert (info.config["hidden_size"], info.config["head_dim"]) == (256, 64)
    assert first_output(torch_model(info.path), input_ids=ids()).isfinite().all()


# Errors


def test_twin_from_a_folder_keeps_processor_facts(twins, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(load_example("minicpmv4_6")))
    facts = {"image_processor_type": "ignored", "resample": 3, "scale_resolution": 448}
    (source / "preprocessor_config.json").write_text(json.dumps(facts))
    info = twin_from(source, tmp_path / "twin")
    written = json.loads((info.path / "preprocessor_config.json").read_text())
    assert written["resample"] == 3
    assert written["scale_resolution"] == 112
    assert (
        hashes(info.path)["model.safetensors"]
        == (hashes(twins["minicpmv4_6"].path)["model.safetensors"])
    )


def test_refusals_say_what_to_do(tmp_path):
    config = load_example("qwen3")
    with pytest.raises(TwinError, match=r"config\.json cannot be read as JSON"):
        twin_from(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(TwinError, match="'int8'; choose one of float32, bfloat16, float16"):
        make_twin(config, tmp_path / "out", dtype="int8")
    with pytest.raises(TwinError, match="has no 'architectures'"):
        make_twin({"model_type": "qwen3"}, tmp_path / "out")
    with pytest.raises(TwinError, match="has no NewForCausalLM of type 'new'"):
        make_twin({"model_type": "new", "architectures": ["NewForCausalLM"]}, tmp_path / "out")
    with pytest.raises(TwinError, match=r"(?s)cannot build a Qwen3ForCausalLM.*layer_types"):
        make_twin(config | {"layer_types": ["none"] * 28}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TwinError, match="full is not empty"):
        make_twin(config, tmp_path / "full")


def test_command_line_start_stays_light():
    script = "import sys, validate.twin; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.split() == ["False", "False"]
