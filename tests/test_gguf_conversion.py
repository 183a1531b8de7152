"""GGUF files converted: values and names as transformers itself reads them, codes kept, proven."""

import json
import shutil

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from gguf_twins import ARCHITECTURES, write_gguf
from release_helpers import status, stored
from safetensors.torch import load_file

from converter.decode import DecodingReader, decoded
from converter.pipeline import Request, convert, plan_request
from converter.plain import plain_release
from converter.plan import Options
from converter.proof import prove
from converter.source import open_folder
from converter.ui import Console
from quant.recipe import QuantSpec
from quant.weights import dequantize_rows
from validate.twin import load_example, make_twin

UNREAD = {"gemma", "mistral", "mixtral"}
"""Types that transformers does not read from GGUF files, or calls llama."""
LOST = {
    "dtype",
    "quantization_config",
    "torch_dtype",
    "pad_token_id",
    "sliding_window_pattern",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "original_max_position_embeddings",
}
"""What the files have no setting for, or a twin has where no release does."""


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return tmp_path_factory.mktemp("twins")


def twin(model_type, folder, matrices):
    """A twin beside its GGUF file, and the values that went into that."""
    out = folder / model_type
    if not out.exists():
        config = load_example(model_type)
        if (config.get("rope_scaling") or {}).get("rope_type") == "llama3" or model_type == "phi3":
            config["rope_scaling"] = None  # what a file holds of it are factors, not settings
        make_twin(config, out, dtype="float32")
    file = out / f"{matrices}.gguf"
    return out, file, write_gguf(out, file, matrices)


def alone(file, folder):
    """The file in a folder of its own."""
    folder.mkdir()
    shutil.copy(file, folder / file.name)
    return folder


def values(path, dtype=None):
    source = open_folder(path)
    view = decoded(source, dtype=dtype)
    with source.open() as raw:
        reader = DecodingReader(raw, view)
        return {
            t.name: np.asarray(reader.read_rows(t.name, 0, t.shape[0]), np.float32)
            for t in view.source.tensors.values()
        }


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_values_and_settings_come_back(model_type, twins, tmp_path):
    folder, file, _ = twin(model_type, twins, "F32")
    found = values(file)
    expected = {n: t.numpy() for n, t in load_file(folder / "model.safetensors").items()}
    for name in [name for name in expected if name.endswith("gate_up_proj") and "experts" in name]:
        for expert, both in enumerate(expected.pop(name)):
            for part, half in zip(("gate_proj", "up_proj"), np.split(both, 2), strict=True):
                place = name.removesuffix("gate_up_proj")
                expected[f"{place}{expert}.{part}.weight"] = half
        down = name.replace("gate_up_proj", "down_proj")
        for expert, one in enumerate(expected.pop(down)):
            expected[f"{down.removesuffix('down_proj')}{expert}.down_proj.weight"] = one
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        # one more or less rounds to float32 where a norm is near 0
        tolerance = 2.0**-23 if name.endswith("norm.weight") else 0
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=tolerance, err_msg=name)
    twins_own = json.loads((folder / "config.json").read_text())
    made = open_folder(alone(file, tmp_path / "alone")).config
    for key in (twins_own.keys() & made.keys()) - LOST:
        if model_type == "mistral" and key in ("model_type", "architectures"):
            continue  # which the files call llama
        if isinstance(made[key], float):
            assert made[key] == pytest.approx(twins_own[key], rel=1e-6), key
        else:
            assert made[key] == twins_own[key], key


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES.keys() - UNREAD))
def test_the_decoded_release_is_what_transformers_reads(model_type, twins):
    """Parameter by parameter and bit for bit: blocks, names, rotary rows, norms and experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, file, _ = twin(model_type, twins, "Q8_0")
    config = AutoConfig.from_pretrained(folder)  # of the file's settings it reads only some
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, config=config, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    with plain_release(file, beside=folder) as plain:
        ours = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_codes_are_kept_through_the_map(twins, tmp_path):
    """What MLX computes with is what the blocks say, in half precision and without a rounding."""
    _, file, _ = twin("qwen3", twins, "Q4_0")
    source = alone(file, tmp_path / "qwen3")
    asked = Options(dtype="float16", quant=QuantSpec.make("affine", 4, 32))
    for name, options in (("kept", Options()), ("asked", asked)):
        out = tmp_path / name
        [result] = convert(
            Request(hf_path=str(source), mlx_path=out, recipes=(options,), workers=2),
            Console(quiet=True),
        )
        became = json.loads((out / "conversion.json").read_text())["decoding"]["became"]
        assert set(became.values()) == {"repacked exactly: GGUF Q4_0"}
        assert "22 weights repacked exactly: GGUF Q4_0" in result.plan.notes
        assert result.plan.config["quantization"]["bits"] == 4
    reader = gguf.GGUFReader(file)
    blocks = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    tensors = stored(tmp_path / "kept")
    module = "model.layers.1.mlp.down_proj"
    parts = {role: tensors[f"{module}.{role}"] for role in ("weight", "scales", "biases")}
    assert parts["scales"].dtype == np.float16
    wide = {role: p if role == "weight" else p.astype(np.float32) for role, p in parts.items()}
    expected = blocks["blk.1.ffn_down.weight"]
    found = dequantize_rows(wide, QuantSpec.make("affine", 4, 32), "F32")
    np.testing.assert_allclose(found, expected, rtol=0, atol=abs(expected).max() * 2e-6)
    other = Request(hf_path=str(source), recipes=(Options(quant=QuantSpec.make("affine", 4, 64)),))
    origins = plan_request(other).plans[0].origins().values()
    assert set(origins) == {"decoded and quantized anew: GGUF Q4_0"}


def test_proven_with_nothing_beside_the_file(twins, tmp_path):
    """Config and tokenizer come from the file, too."""
    from transformers import AutoTokenizer

    folder, file, _ = twin("llama", twins, "Q4_0")
    source = alone(file, tmp_path / "llama")
    assert status("plan", "--hf-path", source, "-q") == 0
    out = tmp_path / "out"
    [result] = convert(Request(hf_path=str(source), mlx_path=out, workers=2), Console(quiet=True))
    assert "tokenizer.json" in result.manifest.files
    text = "Zwei Prüfungen: 17 apples, {'a': [1, 2]}\n\tdone."
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (out, folder))
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text
    turns = [{"role": "user", "content": text}]
    rendered = [t.apply_chat_template(turns, tokenize=False) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]
    report = prove(
        out, source=result.release.local(), console=Console(quiet=True), plan=result.plan
    )
    assert report["verdict"] == "pass", report["checks"]
    assert status("verify", out) == 0
