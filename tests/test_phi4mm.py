"""Phi-4 Multimodal: another class of transformers in its place, adapters that prompts choose."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arch_maps.inverse import invert
from arch_maps.ops import LowRank, Source, evaluate
from converter.proof import prove
from converter.ui import Console
from validate import phi4mm_faults
from validate.phi4mm import read_adapters
from validate.reference import TorchReference, lacks_class
from validate.runtime import MlxRuntime, prepare_mlx

prepare_mlx()
QUIET = Console(quiet=True)
# transformers, reading the config of a type that it does not know to find the tokenizer's class.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def pair(twin_of, tmp_path_factory) -> tuple[Path, Path]:
    from converter.pipeline import Request, convert

    twin = twin_of("phi4mm")
    out = tmp_path_factory.mktemp("phi4mm") / "out"
    convert(Request(hf_path=str(twin), mlx_path=out), QUIET)
    return twin, out


def checks(twin: Path, out: Path) -> dict[tuple[str, str], dict]:
    report = prove(out, source=twin, console=QUIET)
    assert report["reference"]["class"] == "Phi4MultimodalForCausalLM"
    return {(check["modality"], check["name"]): check for check in report["checks"]}


def test_text_and_sounds_pass_and_say_what_the_checkpoint_is(pair) -> None:
    twin, out = pair
    assert lacks_class(twin, trust_remote_code=False) == ""
    found = checks(twin, out)
    assert [key for key, check in found.items() if check["verdict"] == "fail"] == []
    for modality, name in (("text", "logits"), ("audio", "audio/logits")):
        assert found[modality, name]["verdict"] == "pass"
        stock = found[modality, "deviation"]
        assert stock["verdict"] == "info"
        assert stock["value"] > 0.5
        assert "adapter for pictures in its text weights" in stock["note"]
    if find_spec("torchvision") is None:
        row = found["image", "image/processor"]
        assert row["verdict"] == "info"
        assert row["metrics"]["missing"] == "torchvision"
        assert "Install mlx-dayzero[vision]" in row["note"]
    else:
        assert found["image", "image/logits"]["verdict"] == "pass"


@pytest.mark.parametrize(
    ("tensor", "failing"),
    [
        ("audio_projection.speech.proj_0.weight", ("audio", "audio/logits")),
        ("language_model.model.layers.0.self_attn.o_proj.weight", ("text", "logits")),
    ],
)
def test_a_wrong_weight_fails(pair, tmp_path: Path, tensor: str, failing: tuple[str, str]) -> None:
    """Checked by its own weights: neither adapter taken off nor put on may hide a wrong one."""
    twin, out = pair
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "conversion.json").unlink()
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = np.ascontiguousarray(tensors[tensor][::-1])
    save_file(tensors, file, metadata={"format": "mlx"})
    # Against the release itself: a reference of these weights would be wrong with them.
    from validate.parity import run_parity

    report = run_parity(source=twin, mlx_path=tmp_path / "out", plan=None)
    failed = {(c.modality, c.name) for c in report.checks if c.verdict == "fail"}
    assert failing in failed
    assert ("weights", "weights") not in failed


def test_tiles_are_what_the_class_makes_of_them(pair) -> None:
    """Padded tiles of a wide picture, drawn here: the release's processor needs torchvision."""
    import mlx.core as mx
    import torch

    twin, out = pair
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (1, 3, 3, 448, 448)).astype(np.float32)
    mask = np.ones((1, 3, 32, 32), np.float32)
    mask[:, 1:, 20:] = 0  # what is below the picture in its tiles
    mask[:, 2, :, 9:] = 0  # and behind it in the second one
    sizes = np.array([[448, 896]])
    reference = TorchReference.load(twin)
    token = reference.model.config.image_token_id
    lines, columns = 10, 16 + 5
    count = lines * (columns + 1) + 1 + 16 * 17
    ids = np.array([[5, 6, *[token] * count, 7]])
    given = {"pixel_values": pixels, "sizes": sizes, "attention_mask": mask}
    inputs = {f"image_{name}": torch.from_numpy(value) for name, value in given.items()}
    wanted = reference.forward({"input_ids": torch.from_numpy(ids), **inputs})

    model = MlxRuntime.load(out, runtime="mlx_vlm")
    for module, attribute, value in phi4mm_faults.tiles(model.model, twin):
        setattr(module, attribute, value)
    fed = {f"image_{name}": mx.array(value) for name, value in given.items()}
    got = model.run({"input_ids": mx.array(ids), **fed}).prefill
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-4


def test_adapters_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor named '\.lora_A\.' is in its safetensors"):
        read_adapters(tmp_path, "np")


class Arrays(dict):
    """Tensors as a reader of rows."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self[name][start:stop]


def test_an_adapter_is_taken_off_where_its_factors_are_at_hand() -> None:
    base, up, down = Source("base", (6, 4)), Source("up", (6, 2)), Source("down", (2, 4))
    folded = LowRank(base, up, down, 1.5)
    target = Source("target", (6, 4))
    assert invert([(target, folded)]) == {}
    assert invert([(target, folded)], at_hand={"up"}) == {}
    back = invert([(target, folded)], at_hand={"up", "down"})["base"]
    rng = np.random.default_rng(0)
    given = Arrays((s.name, rng.normal(size=s.shape).astype(np.float32)) for s in (base, up, down))
    given["target"] = evaluate(folded, given)
    np.testing.assert_allclose(evaluate(back, given), given["base"], atol=1e-6)
