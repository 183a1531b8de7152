"""A clean pair passes; every planted fault flips the verdict, and the right check says so."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from validate.checks import Check, Report, at_most
from validate.deviations import deviations_for, without
from validate.loaded import CheckpointError, compare_loaded, written_tensors
from validate.parity import run_parity
from validate.reference import ReferenceError
from validate.runtime import MlxRuntime, RuntimeRefusal, prepare_mlx, runtimes_for

prepare_mlx()
mx = import_module("mlx.core")

TINYLM = Path(__file__).parent / "fixtures" / "tinylm"
LAYER = "model.layers.1."


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny random qwen3 as transformers writes it, without a tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.ndim == 2 else 0.3
            value.copy_(torch.randn(value.shape) * scale + (1.0 if "norm" in name else 0.0))
    folder = tmp_path_factory.mktemp("parity") / "source"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory) -> Path:
    """The same weights as an MLX checkpoint: this architecture needs no renaming."""
    folder = tmp_path_factory.mktemp("parity") / "mlx"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    edit_config(folder, rope_theta=50000.0, rope_scaling=None)
    save(folder, load_file(source / "model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def quantized(converted: Path, tmp_path_factory) -> tuple[Path, Path]:
    """(4-bit checkpoint by mlx_lm.convert, torch folder of its dequantized weights)."""
    from mlx_lm import convert

    root = tmp_path_factory.mktemp("quantized")
    full = copy(converted, root / "full")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINYLM / file, full / file)
    convert(str(full), str(root / "q4"), quantize=True, q_bits=4, q_group_size=32)
    dense: dict[str, np.ndarray] = {}
    packed = mx.load(str(root / "q4" / "model.safetensors"))
    for name, value in packed.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and f"{path}.scales" in packed:
            scales, biases = (
                packed[f"{path}.{p}"].astype(mx.float32) for p in ("scales", "biases")
            )
            value = mx.dequantize(value, scales, biases, group_size=32, bits=4)
        if part not in ("scales", "biases"):
            dense[name] = np.array(value.astype(mx.float32))
    (root / "dense").mkdir()
    save(root / "dense", dense)
    shutil.copy(converted / "config.json", root / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "q4" / file).unlink(missing_ok=True)
    return root / "q4", root / "dense"


def judge(source: Path, mlx: Path, **options) -> Report:
    return run_parity(source=source, mlx_path=mlx, plan="sha256:plan", **options)


def rows(report: Report, name: str) -> list[Check]:
    return [check for check in report.checks if check.name == name]


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if check.verdict == "fail"}


def test_a_clean_pair_passes_in_both_runtimes(source: Path, converted: Path) -> None:
    report = judge(source, converted)
    assert report.verdict == "pass"
    assert {check.runtime for check in rows(report, "logits")} == {"mlx_vlm", "mlx_lm"}
    assert all(0 < check.value < 1e-5 for check in rows(report, "logits") + rows(report, "decode"))
    assert all(check.value == 12 for check in rows(report, "greedy"))
    assert report.to_json()["plan"] == "sha256:plan"
    assert not rows(report, "noise")
    assert not rows(report, "loss")


def swap_query_and_key(tensors):
    q, k = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.k_proj.weight"
    tensors[q], tensors[k] = tensors[k], tensors[q]


def shift_norm(tensors):
    tensors[f"{LAYER}input_layernorm.weight"] = tensors[f"{LAYER}input_layernorm.weight"] + 1


def one_wrong_value(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.001)


def not_a_number(tensors):
    weight = tensors[f"{LAYER}mlp.up_proj.weight"].copy()
    weight[3, 5] = np.nan
    tensors[f"{LAYER}mlp.up_proj.weight"] = weight


@pytest.mark.parametrize("fault", [swap_query_and_key, shift_norm, one_wrong_value, not_a_number])
def test_a_wrong_weight_fails(source: Path, converted: Path, tmp_path: Path, fault) -> None:
    broken = copy(converted, tmp_path / "mlx")
    tensors = load_file(broken / "model.safetensors")
    fault(tensors)
    save(broken, tensors)
    report = judge(source, broken)
    assert report.verdict == "fail"
    assert {"logits", "decode"} <= failed(report)
    # The runtime did load what was written: the fault is in the conversion.
    assert "weights" not in failed(report)
    json.dumps(report.to_json(), allow_nan=False)


def test_a_wrong_rope_theta_fails(source: Path, converted: Path, tmp_path: Path) -> None:
    broken = copy(converted, tmp_path / "mlx")
    edit_config(broken, rope_theta=10000.0, rope_parameters=None)
    assert "logits" in failed(judge(source, broken))


def test_a_missing_tensor_is_refused_by_the_runtime(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    broken = copy(converted, tmp_path / "mlx")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save(broken, tensors)
    report = judge(source, broken)
    assert report.verdict == "fail"
    assert "model.norm.weight" in rows(report, "load")[0].note


def test_quantized_output_is_judged_twice(source: Path, quantized: tuple[Path, Path]) -> None:
    q4, dense = quantized
    report = judge(source, q4, dequantized=dense)
    assert report.verdict == "pass"
    assert all(check.value < 1e-5 for check in rows(report, "logits"))
    assert all(check.value < 1e-5 for check in rows(report, "packed kernel"))
    losses = rows(report, "loss")
    assert {check.verdict for check in losses} == {"info"}
    assert all(check.value > 1e-3 and check.metrics["top1"] < 1 for check in losses)
    for check in losses:
        figures = [check.metrics[f"kl_{name}"] for name in ("median", "p90", "p99", "p999", "max")]
        assert figures == sorted(figures)
        assert check.metrics["perplexity_ratio"] > 0
    strict = judge(source, q4, dequantized=dense, kl_threshold=1e-6)
    assert failed(strict) == {"loss"}
    assert judge(source, q4, dequantized=dense, kl_threshold=50.0).verdict == "pass"


def test_one_flipped_code_fails(source: Path, quantized: tuple[Path, Path], tmp_path: Path) -> None:
    q4, dense = quantized
    broken = copy(q4, tmp_path / "mlx")
    tensors = load_file(broken / "model.safetensors")
    codes = tensors["lm_head.weight"].copy()
    codes[7, 2] ^= 1 << 14
    tensors["lm_head.weight"] = codes
    save(broken, tensors)
    assert "logits" in failed(judge(source, broken, dequantized=dense))


def test_quantized_output_alone_proves_nothing(source: Path, quantized: tuple[Path, Path]) -> None:
    report = judge(source, quantized[0])
    assert report.verdict == "fail"
    (check,) = rows(report, "logits")
    assert "no torch checkpoint of its dequantized weights" in check.note
    assert rows(report, "loss")


def test_bf16_is_exact_in_float32_and_within_torchs_noise(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    narrow = copy(converted, tmp_path / "mlx")
    tensors = load_file(narrow / "model.safetensors")
    save(narrow, {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
    report = judge(source, narrow)
    assert report.verdict == "pass"
    assert report.reference["rounded_to"] == "bfloat16"
    assert all(check.value < 1e-5 for check in rows(report, "logits"))
    assert all(0.2 < check.value < 2 for check in rows(report, "noise"))
    assert all(check.verdict == "info" for check in rows(report, "loss"))


def test_tinylm_agrees_token_for_token(tmp_path: Path) -> None:
    folder = tmp_path / "tinylm"
    folder.mkdir()
    for file in TINYLM.iterdir():
        shutil.copyfile(file, folder / file.name)
    edit_config(folder, rope_theta=10000.0, rope_scaling=None)
    report = judge(TINYLM, folder)
    assert report.verdict == "pass"
    assert [check.value for check in rows(report, "tokens")] == [0.0, 0.0]
    assert all(check.value < 1e-5 for check in rows(report, "logits"))
    # As transformers 5 writes it, mlx-vlm cannot load it.
    shutil.copyfile(TINYLM / "config.json", folder / "config.json")
    (load,) = rows(judge(TINYLM, folder), "load")
    assert (load.runtime, load.verdict) == ("mlx_vlm", "fail")
    assert "rope_theta" in load.note


def test_other_token_ids_fail(tmp_path: Path) -> None:
    folder = tmp_path / "tinylm"
    folder.mkdir()
    for file in TINYLM.iterdir():
        shutil.copyfile(file, folder / file.name)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = "e", "t"
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit_config(folder, rope_theta=10000.0, rope_scaling=None)
    report = judge(TINYLM, folder)
    assert failed(report) == {"tokens"}


@pytest.fixture(scope="module")
def picture_pair(tmp_path_factory) -> tuple[Path, Path]:
    """A twin that sees pictures, and what mlx-vlm makes of it when it loads it."""
    from validate.twin import load_example, make_twin

    root = tmp_path_factory.mktemp("pictures")
    twin = make_twin(load_example("minicpmv4_6"), root / "twin").path
    mlx = copy(twin, root / "mlx")
    parameters = MlxRuntime.load(twin, runtime="mlx_vlm").parameters()
    mx.save_safetensors(str(mlx / "model.safetensors"), parameters, metadata={"format": "mlx"})
    return twin, mlx


def test_pictures_through_both_processors(picture_pair: tuple[Path, Path]) -> None:
    report = judge(*picture_pair)
    assert report.verdict == "pass", failed(report)
    values = {check.name: check.value for check in report.checks if check.modality == "image"}
    assert values["image/input_ids"] == 0
    assert values["image/pixel_values"] == 0
    assert values["image/logits"] < 1e-4
    # What the stock runtime computes with its approximate GELU is stated beside it.
    assert 1e-4 < values["deviation"] < 1e-2
    assert values["image/prompt"] == 2


def test_a_wrong_vision_weight_fails_only_pictures(
    picture_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    twin, mlx = picture_pair
    broken = copy(mlx, tmp_path / "mlx")
    tensors = load_file(broken / "model.safetensors")
    name = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] * np.float32(1.3)
    save(broken, tensors)
    report = judge(twin, broken)
    assert (
        {"image/logits"}
        <= failed(report)
        <= {
            "image/logits",
            "image/decode",
            "image/greedy",
            "deviation",
        }
    )
    assert judge(twin, broken, images=False).verdict == "pass"


def test_an_encoder_is_judged_by_its_embeddings(tmp_path: Path) -> None:
    from validate.twin import load_example, make_twin

    twin = make_twin(load_example("bert"), tmp_path / "twin").path
    mlx = copy(twin, tmp_path / "mlx")
    parameters = MlxRuntime.load(twin, runtime="mlx_vlm").parameters()
    mx.save_safetensors(str(mlx / "model.safetensors"), parameters, metadata={"format": "mlx"})
    report = judge(twin, mlx)
    assert report.verdict == "pass"
    assert rows(report, "hidden")[0].value < 1e-5
    assert rows(report, "tokens")[0].value == 0
    tensors = load_file(mlx / "model.safetensors")
    name = "encoder.layer.0.attention.self.key.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save(mlx, tensors)
    assert "hidden" in failed(judge(twin, mlx))


def test_a_tower_is_judged_by_its_states(tmp_path: Path) -> None:
    from validate.twin import load_example, make_twin

    twin = make_twin(load_example("dinov2"), tmp_path / "twin").path
    mlx = copy(twin, tmp_path / "mlx")
    parameters = MlxRuntime.load(twin, runtime="mlx_vlm").parameters()
    mx.save_safetensors(str(mlx / "model.safetensors"), parameters, metadata={"format": "mlx"})
    report = judge(twin, mlx)
    assert report.verdict == "pass", failed(report)
    assert rows(report, "image/hidden")[0].value < 1e-5
    tensors = load_file(mlx / "model.safetensors")
    tensors["pos_embed"] = np.ascontiguousarray(tensors["pos_embed"][:, ::-1])
    save(mlx, tensors)
    assert failed(judge(twin, mlx)) == {"image/hidden"}


# What was loaded


def test_loaded_weights_equal_the_file(converted: Path) -> None:
    for runtime in ("mlx_vlm", "mlx_lm"):
        model = MlxRuntime.load(converted, runtime=runtime)
        result = compare_loaded(converted, model.parameters())
        assert result.problems == ()
        assert result.tensors == len(written_tensors(converted))


def test_loaded_weights_that_differ_are_named(converted: Path) -> None:
    model = MlxRuntime.load(converted, runtime="mlx_lm")
    parameters = model.parameters()
    parameters["model.norm.weight"] = parameters["model.norm.weight"] + 1
    parameters["lm_head.weight"] = parameters["lm_head.weight"].astype(mx.float16)
    parameters["model.embed_tokens.weight"] = parameters["model.embed_tokens.weight"].T
    parameters["extra.weight"] = parameters.pop(f"{LAYER}mlp.up_proj.weight")
    problems = compare_loaded(converted, parameters).problems
    assert "model.norm.weight: 64 of 64 values differ from the file" in problems
    assert "lm_head.weight: written as F32, loaded as F16" in problems
    assert (
        "model.embed_tokens.weight: written with shape [320, 64], loaded with [64, 320]" in problems
    )
    assert "extra.weight: a parameter of the runtime, in no file" in problems
    assert f"{LAYER}mlp.up_proj.weight: in a file, never loaded" in problems


def test_a_tensor_in_two_files_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = copy(converted, tmp_path / "mlx")
    shutil.copy(folder / "model.safetensors", folder / "model-extra.safetensors")
    with pytest.raises(CheckpointError, match=r"is in both model-extra.* and model\.safetensors"):
        written_tensors(folder)


# Refusals


def test_a_reference_with_random_weights_is_refused(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    holed = copy(source, tmp_path / "source")
    tensors = load_file(holed / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReferenceError, match=r"model\.norm\.weight"):
        judge(holed, converted)


def test_code_in_the_checkpoint_does_not_run(converted: Path, tmp_path: Path) -> None:
    folder = copy(converted, tmp_path / "mlx")
    (folder / "model.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_file="model.py")
    with pytest.raises(RuntimeRefusal, match="--trust-remote-code"):
        MlxRuntime.load(folder, runtime="mlx_vlm")


def test_an_unknown_model_type_is_a_failed_check(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    folder = copy(converted, tmp_path / "mlx")
    edit_config(folder, model_type="nonesuch")
    assert runtimes_for({"model_type": "nonesuch", "architectures": ["XForCausalLM"]}) == ()
    assert "neither mlx-vlm nor mlx-lm" in rows(judge(source, folder), "load")[0].note


# Verdicts


def test_what_is_not_finite_never_passes() -> None:
    assert at_most(float("nan"), 1.0) == "fail"
    assert at_most(float("inf"), None) == "fail"
    assert at_most(1.0, 1.0) == "pass"
    assert at_most(1.0, None) == "info"


def test_a_report_without_compared_outputs_fails() -> None:
    weights = Check(name="weights", modality="weights", verdict="pass")
    logits = Check(name="logits", modality="text", verdict="pass")
    bad = Check(name="tokens", modality="tokens", verdict="fail")

    def verdict(*checks: Check) -> str:
        return Report(plan=None, reference={}, runtime={}, checks=checks).verdict

    assert verdict() == "fail"
    assert verdict(weights) == "fail"
    assert verdict(weights, logits) == "pass"
    assert verdict(weights, logits, bad) == "fail"


def test_a_deviation_is_put_back_afterwards() -> None:
    class Block:
        act = "stock"

    class Model:
        class merger:
            mlp = (Block(), Block())

    known = deviations_for("mlx_vlm", model_type="minicpmv4_6", modality="image")
    assert [item.name for item in known] == ["merger activation"]
    with without(known, Model):
        assert all(block.act != "stock" for block in Model.merger.mlp)
    assert all(block.act == "stock" for block in Model.merger.mlp)
    assert deviations_for("mlx_lm", model_type="minicpmv4_6", modality="image") == ()
