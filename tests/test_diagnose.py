"""The failures that conversions were published with, each made again and named in a sentence."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mtp_twins import make_mtp_twin
from release_helpers import FOUR_BIT, make, status
from safetensors.numpy import load_file, save_file

from converter.diagnose import diagnose

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A release with pictures, a patch kernel, and layers that predict further tokens."""
    return make_mtp_twin("qwen3_5", tmp_path_factory.mktemp("diagnose") / "twin")


@pytest.fixture(scope="module")
def sound(source: Path) -> Path:
    (out,) = make(source, source.parent / "out", FOUR_BIT)
    return out


@pytest.fixture
def bad(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil, as if someone else had made it."""
    copy = shutil.copytree(sound, tmp_path / "bad")
    (copy / "conversion.json").unlink()
    return copy


def told(out: Path, source: Path) -> dict[str, str]:
    return {check.name: check.note for check in diagnose(out, source) if check.verdict == "fail"}


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def retensor(out: Path, change) -> None:
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "mlx"})


def test_a_sound_checkpoint_has_nothing_to_say(sound: Path, source: Path) -> None:
    assert diagnose(sound, source) == []


def test_lost_drafter_layers_are_told_of_foreign_conversions(bad: Path, source: Path) -> None:
    (row,) = diagnose(bad, source)
    assert (row.name, row.verdict) == ("drafter", "info")
    assert "tensors for predicting further tokens (mtp." in row.note
    assert "convert --mtp makes a drafter" in row.note


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("tokenizer.json", "the tokenizer is missing: none of tokenizer.json"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        (
            "generation_config.json",
            "generation_config.json is missing: the tokens at which to stop",
        ),
        ("chat_template.jinja", "the chat template is missing"),
        ("preprocessor_config.json", "the processor's settings are missing"),
    ],
)
def test_a_missing_file(bad: Path, source: Path, file: str, says: str) -> None:
    (bad / file).unlink()
    assert says in told(bad, source)["tokenizer and processor"]


def test_lost_and_renumbered_tokens(bad: Path, source: Path) -> None:
    def spoil(data):
        data["added_tokens"] = [t for t in data["added_tokens"] if "im_end" not in t["content"]]
        vocab = data["model"]["vocab"]
        a, b = list(vocab)[40:42]
        vocab[a], vocab[b] = vocab[b], vocab[a]

    edit(bad / "tokenizer.json", spoil)
    note = told(bad, source)["tokenizer and processor"]
    assert "tokenizer.json lacks 1 tokens of the release: <|im_end|>" in note
    assert "tokenizer.json gives 2 tokens other ids than the release" in note


def stale_entry(out: Path) -> None:
    edit(out / INDEX, lambda d: d["weight_map"].update({"model.gone.weight": WEIGHTS}))


def absent_shard(out: Path) -> None:
    first = next(iter(load_file(out / WEIGHTS)))
    edit(out / INDEX, lambda d: d["weight_map"].update({first: "model-00002-of-00002.safetensors"}))


def stray_file(out: Path) -> None:
    save_file({"model.norm.weight": np.ones(4, np.float32)}, out / "model-old.safetensors")


def lacking_entry(out: Path) -> None:
    edit(out / INDEX, lambda d: d["weight_map"].pop(next(iter(d["weight_map"]))))


def wrong_size(out: Path) -> None:
    edit(out / INDEX, lambda d: d["metadata"].update(total_size=7))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (stale_entry, "the index is stale: it lists model.gone.weight, in none of the files"),
        (absent_shard, "names model-00002-of-00002.safetensors, which the folder does not hold"),
        (stray_file, "model-old.safetensors is not in the index, and mlx-lm loads every"),
        (lacking_entry, "the index is stale: it lacks "),
        (wrong_size, "total_size says 7 bytes"),
    ],
)
def test_a_stale_index(bad: Path, source: Path, spoil, says: str) -> None:
    spoil(bad)
    assert says in told(bad, source)["index"]


def renamed_key(config: dict) -> None:
    """A per-layer key in the release's spelling, not the runtime's."""
    key = "model.language_model.layers.0.mlp.down_proj"
    config["quantization"][key] = {"bits": 8, "group_size": 32}


def no_quantization(config: dict) -> None:
    del config["quantization"], config["quantization_config"]


def other_bits(config: dict) -> None:
    config["quantization"]["bits"] = 8


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (renamed_key, "layers.0.mlp.down_proj is the path of no module (did it mean "),
        (no_quantization, "config.json has no quantization, but "),
        (other_bits, "which is not 8 bits in groups of 32 as config.json says"),
    ],
)
def test_a_wrong_quantization(bad: Path, source: Path, spoil, says: str) -> None:
    edit(bad / "config.json", spoil)
    assert says in told(bad, source)["quantization"]


def test_a_quantization_that_nothing_has(source: Path, tmp_path: Path) -> None:
    (out,) = make(source, tmp_path / "plain")
    edit(out / "config.json", lambda c: c.update(quantization={"bits": 4, "group_size": 32}))
    assert "no tensor is packed" in told(out, source)["quantization"]


CONV = "vision_tower.patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        # The runtime's kernel is [out, frames, height, width, channels].
        (lambda w: w.transpose(0, 4, 1, 2, 3), "is not transposed"),
        (lambda w: w.transpose(0, 2, 3, 4, 1), "is transposed twice"),
        (lambda w: w.transpose(0, 2, 1, 3, 4), "is transposed another way"),
    ],
)
def test_a_transposed_kernel(bad: Path, source: Path, change, says: str) -> None:
    retensor(bad, lambda t: t.update({CONV: np.ascontiguousarray(change(t[CONV]))}))
    note = told(bad, source)["layout"]
    assert f"{CONV} {says}" in note


def raw_bytes(tensors: dict, name: str, numbers: np.ndarray) -> None:
    tensors[name] = numbers.astype(np.uint8)


def integers(tensors: dict, name: str, numbers: np.ndarray) -> None:
    tensors[name] = numbers.astype(ml_dtypes.bfloat16)


def left_over(tensors: dict, name: str, numbers: np.ndarray) -> None:
    tensors[name.replace("weight", "weight_scale_inv")] = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (raw_bytes, "is stored as U8: a runtime reads the bytes of 8-bit floats"),
        (integers, "holds whole numbers from 0 to 255: 8-bit floats were read as integers"),
        (left_over, "weight_scale_inv is left over from the release's own quantization"),
    ],
)
def test_eight_bit_floats_read_as_integers(bad: Path, source: Path, change, says: str) -> None:
    def spoil(tensors: dict) -> None:
        name = next(n for n in tensors if n.startswith("vision_tower.") and "fc1.weight" in n)
        numbers = np.random.default_rng(0).integers(0, 255, tensors[name].shape)
        change(tensors, name, numbers)

    retensor(bad, spoil)
    assert says in told(bad, source)["numbers"]


def test_validate_says_it_before_a_runtime_starts(bad: Path, source: Path, capsys) -> None:
    (bad / "chat_template.jinja").unlink()
    assert status("validate", "--hf-path", source, "--mlx-path", bad) == 4
    shown = capsys.readouterr()
    assert "the chat template is missing: prompts are sent without turns or roles" in shown.out
    report = json.loads((bad / "parity.json").read_text())
    assert report["runtime"] == {"runtimes": []}
    assert {check["modality"] for check in report["checks"]} == {"files"}
