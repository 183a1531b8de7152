"""From MLX back: to torch bit for bit, and dequantized as mx.dequantize does."""

import json

import numpy as np
import pytest
from release_helpers import (
    FOUR_BIT,
    LLAMA,
    hashes,
    llama_tensors,
    make,
    same_bits,
    status,
    stored,
    write_release,
)
from safetensors import safe_open

from converter.plan import Options
from quant.recipe import QuantSpec

TO_TORCH = Options(target="torch")
EXACT = ("llama", "mistral", "qwen3")
OFFSET = ("minicpmv4_6", "qwen3_5", "qwen3_5_text")
QUANTS = [("affine", bits, group) for bits, group in ((2, 32), (3, 64), (4, 64), (5, 32), (8, 128))]
QUANTS += [(mode, None, None) for mode in ("mxfp4", "mxfp8", "nvfp4")]


def there_and_back(source, tmp_path, *recipes):
    [mlx] = make(source, tmp_path / "mlx", *recipes)
    [torch] = make(mlx, tmp_path / "torch", TO_TORCH)
    return torch


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", EXACT)
def test_exact_maps_give_every_tensor_back(model_type, dtype, twin_of, tmp_path):
    source = twin_of(model_type, dtype)
    back = there_and_back(source, tmp_path)
    original = stored(source)
    returned = stored(back)
    assert returned.keys() == original.keys()
    assert [n for n, x in original.items() if not same_bits(x, returned[n])] == []
    assert config_of(back) == config_of(source)
    with safe_open(back / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    sidecars = hashes(source).keys() - {"config.json", "model.safetensors"}
    assert {n: hashes(back)[n] for n in sidecars} == {n: hashes(source)[n] for n in sidecars}


def test_bert_comes_back_without_its_pooler(twin_of, tmp_path):
    source = twin_of("bert")
    returned, original = stored(there_and_back(source, tmp_path)), stored(source)
    lost = original.keys() - returned.keys()
    assert lost == {name for name in original if name.startswith("pooler.")}
    assert all(same_bits(original[n], x) for n, x in returned.items())


@pytest.mark.parametrize("model_type", OFFSET)
def test_norms_stored_as_a_sum_come_back_within_rounding(model_type, twin_of, tmp_path):
    source = twin_of(model_type)
    returned, original = stored(there_and_back(source, tmp_path)), stored(source)
    assert returned.keys() == {n for n in original if not n.startswith("mtp.")}
    rounded = [n for n, x in returned.items() if not same_bits(original[n], x)]
    assert all("norm" in name and name.endswith("weight") for name in rounded)
    for name in rounded:
        np.testing.assert_allclose(returned[name], original[name], rtol=0, atol=2.0**-23)
    exact_norms = [n for n in original if ".linear_attn.norm." in n or "vision" in n]
    assert not set(exact_norms) & set(rounded)


def test_tied_head_that_was_there_is_there_again(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = llama_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_release(tmp_path / "in", config, tensors)
    returned = stored(there_and_back(source, tmp_path))
    assert returned.keys() == tensors.keys()
    assert all(same_bits(x, returned[n]) for n, x in tensors.items())


def test_transformers_reads_what_came_back(twin_of, tmp_path):
    import torch
    import transformers

    source = twin_of("qwen3")
    back = there_and_back(source, tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        a, b = (
            transformers.AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (source, back)
        )
    assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", QUANTS, ids=str)
def test_dequantized_is_what_mx_dequantize_gives(recipe, tmp_path, runtimes):
    import mlx.core as mx

    spec = QuantSpec.make(*recipe)
    config = LLAMA | {"hidden_size": 128, "intermediate_size": 256}
    source = write_release(tmp_path / "in", config)
    [quantized] = make(source, tmp_path / "q", Options(quant=spec))
    [plain] = make(quantized, tmp_path / "plain", dequantize=True)
    codes = mx.load(str(quantized / "model.safetensors"))
    values = mx.load(str(plain / "model.safetensors"))
    assert values.keys() == llama_tensors(config).keys()
    for name, value in values.items():
        module = name.removesuffix(".weight")
        expected = codes[name]
        if f"{module}.scales" in codes:
            expected = mx.dequantize(
                codes[name],
                codes[f"{module}.scales"],
                codes.get(f"{module}.biases"),
                group_size=spec.group_size,
                bits=spec.bits,
                mode=spec.mode,
            )
        assert value.dtype == expected.dtype == mx.bfloat16
        assert mx.array_equal(value, expected), name
    assert not {"quantization", "quantization_config"} & config_of(plain).keys()
    with safe_open(plain / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}


def test_dequantized_output_is_one_that_mlx_lm_loads(tmp_path, tinylm, runtimes):
    from mlx_lm.utils import load_model

    [quantized] = make(tinylm, tmp_path / "q", FOUR_BIT)
    [plain] = make(quantized, tmp_path / "plain", dequantize=True)
    model, _ = load_model(plain)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"


@pytest.mark.parametrize("quantize", [False, True])
def test_checkpoint_of_mlx_lm_goes_back_too(quantize, twin_of, tmp_path, runtimes):
    import mlx.core as mx
    from mlx_lm.convert import convert

    source = twin_of("qwen3")
    theirs = tmp_path / "theirs"
    convert(str(source), mlx_path=str(theirs), quantize=quantize, q_bits=4, q_group_size=32)
    [back] = make(theirs, tmp_path / "torch", TO_TORCH)
    returned, original = stored(back), stored(source)
    assert returned.keys() == original.keys()
    if not quantize:
        assert all(same_bits(x, returned[n]) for n, x in original.items())
        return
    codes = mx.load(str(theirs / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj"
    parts = [codes[f"{name}.{role}"] for role in ("weight", "scales", "biases")]
    expected = mx.dequantize(*parts, group_size=32, bits=4)
    assert np.array_equal(np.array(expected), returned[f"{name}.weight"])
    assert "quantization" not in config_of(back)


def test_dtype_of_what_came_back_is_stated(tmp_path):
    source = write_release(tmp_path / "in")
    back = there_and_back(source, tmp_path, Options(dtype="float16"))
    assert {x.dtype for x in stored(back).values()} == {np.dtype(np.float16)}
    assert config_of(back)["dtype"] == "float16"


def damaged(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(config_of(folder) | changes))


def test_settings_that_do_not_fit_the_codes_are_refused(tmp_path, capsys):
    source = write_release(tmp_path / "in")
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    for quantization, words in (
        ({"group_size": 32, "bits": 8, "mode": "affine"}, "does not fit 8 bits in groups of 32"),
        ({"group_size": 32, "bits": 7, "mode": "affine"}, "--q-bits 7 contradicts"),
        ({"group_size": 32, "bits": 4, "mode": "int4"}, "--q-mode int4 is unknown"),
    ):
        damaged(out, quantization=quantization)
        for flags in (("-d",), ("--to", "torch")):
            code = status("--hf-path", out, "--mlx-path", tmp_path / "no", *flags)
            message = capsys.readouterr().err
            assert code == 3, message
            assert words in message
            assert not (tmp_path / "no").exists()


def test_torch_release_is_no_mlx_checkpoint(tmp_path, capsys):
    """Passing it on as it is would give a checkpoint without a mapped config."""
    source = write_release(tmp_path / "in")
    for flags in (("-d",), ("--to", "torch")):
        assert status("--hf-path", source, "--mlx-path", tmp_path / "out", *flags) == 3
        assert "MLX" in capsys.readouterr().err
