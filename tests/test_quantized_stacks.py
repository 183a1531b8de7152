"""Quantized tensors that are no linear layer's: experts in one stack, tables of n-grams."""

import json
import shutil

import numpy as np
import pytest
import torch
from quantized_helpers import release, rows_of, view_of
from quantized_twins import E2M1, nearest
from release_helpers import make, stored
from safetensors.torch import load_file, save_file

from arch_maps.registry import find
from converter.decode import decoded
from converter.errors import PlanError
from converter.plan.match import match_release
from converter.source import open_folder

STACK = "mlp.experts.w13_weight"
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


def stack(**changed):
    """Two experts of two rows: 0.5 and 1.0 by turns, times block scales, times 0.5 and 4."""
    blocks = torch.tensor([[[1.0, 2.0], [4.0, 8.0]], [[1.0, 1.0], [2.0, 0.5]]])
    tensors = {
        STACK: torch.full((2, 2, 16), 0x21, dtype=torch.uint8),
        f"{STACK}.scale": blocks.to(torch.float8_e4m3fn),
        f"{STACK}.scale2": torch.tensor([0.5, 4.0]),
        f"{STACK}.input_amax": torch.tensor([3.0]),
        f"{STACK}.original_shape": torch.tensor([2, 2, 32]),
    }
    return {**tensors, **{f"{STACK}.{name}": value for name, value in changed.items()}}


@pytest.mark.parametrize("step", [1, 2])
def test_each_matrix_of_a_stack_has_a_scale_of_its_own(step, tmp_path):
    view = view_of(release(tmp_path, stack(), NVFP4))
    rows = rows_of(tmp_path, view, STACK, step=step)
    assert rows.shape == (2, 2, 32)
    assert rows[:, :, :2].tolist() == [[[0.25, 0.5], [1, 2]], [[2, 4], [4, 8]]]
    assert rows[:, :, 30:].tolist() == [[[0.5, 1], [2, 4]], [[2, 4], [1, 2]]]
    assert {drop.name for drop in view.drops} == {
        f"{STACK}.input_amax",
        f"{STACK}.original_shape",
    }


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"scale2": torch.ones(3)}, r"scale2: is \[3\], but .* make it \[2\]"),
        ({"scale": torch.ones(2, 2, 1).to(torch.float8_e4m3fn)}, r"scale: is \[2, 2, 1\]"),
        ({"scale": torch.ones(2, 2, 2)}, "scale: is F32, where F8_E4M3 is expected"),
    ],
)
def test_scales_that_do_not_fit_the_stack(changed, problem, tmp_path):
    with pytest.raises(PlanError, match=problem):
        view_of(release(tmp_path, stack(**changed), NVFP4))


def test_a_stack_that_is_said_to_be_plain(tmp_path):
    settings = {**NVFP4, "exclude_modules": ["mlp.experts"]}
    with pytest.raises(PlanError, match="says that it is not quantized, but its tensors are there"):
        view_of(release(tmp_path, stack(), settings))


def packed(weight):
    """A stack [experts, out, in] in NVFP4: codes, block scales and a scale per expert."""
    rows = weight.float().reshape(-1, weight.shape[-1])
    whole = weight.float().abs().amax((1, 2)) / (6 * 448)
    each = whole.repeat_interleave(weight.shape[1])[:, None]
    peaks = rows.reshape(len(rows), -1, 16).abs().amax(-1) / 6
    blocks = (peaks / each).to(torch.float8_e4m3fn)
    codes = nearest(rows, blocks.float() * each, E2M1)
    lead = weight.shape[:-1]
    return {
        "": (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(*lead, -1),
        ".scale": blocks.reshape(*lead, -1),
        ".scale2": whole,
        ".input_amax": torch.tensor([1.5]),
        ".original_shape": torch.tensor(weight.shape),
    }


def inkling_nvfp4(twin, out):
    """The twin as its release in NVFP4 is: all routed experts packed but the first layer's."""
    shutil.copytree(twin, out)
    tensors = load_file(out / "model.safetensors")
    first = min(name for name in tensors if ".experts.w13_weight" in name).split(".mlp.")[0]
    for name in [n for n in tensors if ".mlp.experts.w" in n and not n.startswith(first)]:
        tensors |= {f"{name}{end}": part for end, part in packed(tensors.pop(name)).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    left = ["model.llm.embed", "model.llm.unembed", "model.visual*", "model.audio*"]
    left += ["model.llm.layers.*.attn*", f"{first}.mlp.experts", "*.mlp.shared_experts*"]
    settings = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": left}
    said = {"producer": {"name": "modelopt"}, "quantization": settings}
    (out / "hf_quant_config.json").write_text(json.dumps(said))
    return out


def by_mlx(tensors, name):
    """A packed stack as MLX's own NVFP4 decodes it, times the scale of each expert."""
    import mlx.core as mx

    codes = mx.array(tensors[name].numpy()).view(mx.uint32)
    scales = mx.array(tensors[f"{name}.scale"].view(torch.uint8).numpy())
    plain = mx.dequantize(codes, scales, group_size=16, bits=4, mode="nvfp4").astype(mx.float32)
    return np.array(plain) * tensors[f"{name}.scale2"].numpy()[:, None, None]


def test_inklings_experts_are_decoded_before_the_map(twin_of, runtimes, tmp_path):
    source = inkling_nvfp4(twin_of("inkling_mm_model"), tmp_path / "release")
    [folder] = make(source, tmp_path / "out")
    tensors, found = load_file(source / "model.safetensors"), stored(folder)
    stacks = [name.removesuffix(".scale2") for name in tensors if name.endswith(".scale2")]
    assert len(stacks) == 6
    assert any(tensors[name].dtype != torch.uint8 for name in tensors if ".experts.w2" in name)
    for name in stacks:
        wanted = by_mlx(tensors, name)
        layer = name.removeprefix("model.llm.").split(".experts.")[0]
        place = f"language_model.model.{layer}.switch_mlp"
        parts = {"down_proj": wanted}
        if "w13" in name:
            parts = {"gate_proj": wanted[:, 0::2], "up_proj": wanted[:, 1::2]}
        for part, values in parts.items():  # which differ in the order of two products
            given = found[f"{place}.{part}.weight"]
            np.testing.assert_allclose(given, values, rtol=2e-7, atol=0, err_msg=name)
        assert set(found[f"{place}.out_scale"]) == {1.0}


def table_in_fp8(twin, out, *, left):
    """The twin with whole tables in FP8, a scale for each, and ``left`` said to be plain."""
    shutil.copytree(twin, out)
    tensors = load_file(out / "model.safetensors")
    tables = sorted({n.rpartition(".shard_")[0] for n in tensors if ".shard_" in n})
    for table in tables:
        parts = [n for n in tensors if n.startswith(f"{table}.shard_")]
        whole = torch.cat([tensors.pop(f"{table}.shard_{i}.weight") for i in range(len(parts))])
        scale = (whole.abs().amax() / 448).to(torch.bfloat16)
        tensors[f"{table}.weight"] = (whole / scale.float()).to(torch.float8_e4m3fn)
        tensors[f"{table}.weight_scale"] = scale.reshape(1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {**NVFP4, "ignore": left}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("left", [["lm_head"], ["lm_head", "*.ple.*"]])
def test_a_whole_table_in_fp8_is_decoded_whatever_is_left_plain(left, twin_of, tmp_path):
    source = table_in_fp8(twin_of("qwen4_exp"), tmp_path / "release", left=left)
    view = decoded(open_folder(source))
    match = match_release(view.source, find("qwen4_exp"))
    assert match.layout.name.endswith("n-gram tables whole")
    [folder] = make(source, tmp_path / "out")
    tensors, found = load_file(source / "model.safetensors"), stored(folder)
    tables = [name for name in tensors if name.endswith("ngram_embedding.weight")]
    assert len(tables) == 2
    for name in tables:
        wanted = tensors[name].float() * tensors[f"{name}_scale"].float()
        place = "language_model.model." + name.removeprefix("model.language_model.")
        place = place.removesuffix("weight") + "shards"
        shards = [found[f"{place}.{i}.weight"] for i in range(12)]
        np.testing.assert_array_equal(np.concatenate(shards), wanted.numpy(), name)


def test_a_matrix_that_is_said_to_be_plain_is_a_contradiction(twin_of, tmp_path):
    source = table_in_fp8(twin_of("qwen4_exp"), tmp_path / "release", left=["lm_head"])
    tensors = load_file(source / "model.safetensors")
    name = "model.language_model.layers.1.ple.key_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["*.ple.*"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as caught:
        decoded(open_folder(source))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        name.removesuffix(".weight")
    ]
