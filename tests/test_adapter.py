"""Adapters fused into a release: PEFT's formulas written out, mlx-lm's own fuse, and the proof."""

import json

import numpy as np
import pytest
from release_helpers import (
    LLAMA,
    factors,
    llama_tensors,
    make,
    peft_config,
    peft_pair,
    status,
    stored,
    write_adapter,
    write_release,
)
from safetensors.numpy import load_file

from converter.errors import PlanError, UsageError
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.proof import prove
from converter.ui import Console
from quant.recipe import QuantSpec

QUIET = Console(quiet=True)
WIDE = Options(dtype="float32")
Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def base(tmp_path):
    return write_release(tmp_path / "base")


@pytest.fixture
def lora(tmp_path):
    """A LoRA of two matrices with a pattern for each setting."""
    pairs = peft_pair(Q, *factors((64, 64), 4, 1)) | peft_pair(DOWN, *factors((64, 128), 2, 2))
    config = peft_config(rank_pattern={"down_proj": 2}, alpha_pattern={"mlp.down_proj": 3})
    return write_adapter(tmp_path / "tuned", config, pairs)


def wide(name):
    return llama_tensors(LLAMA)[f"{name}.weight"].astype(np.float32)


def close(found, expected):
    return np.allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_lora_adds_the_scaled_product(base, lora, tmp_path):
    plain = stored(make(base, tmp_path / "plain", WIDE)[0])
    fused = stored(make(base, tmp_path / "fused", WIDE, adapter_path=lora)[0])
    changed = {name for name in plain if plain[name].tobytes() != fused[name].tobytes()}
    assert changed == {f"{Q}.weight", f"{DOWN}.weight"}
    a, b = factors((64, 64), 4, 1)
    assert close(fused[f"{Q}.weight"], wide(Q) + 8 / 4 * (b @ a))
    a, b = factors((64, 128), 2, 2)
    assert close(fused[f"{DOWN}.weight"], wide(DOWN) + 3 / 2 * (b @ a))


def test_rslora_divides_by_the_root_of_the_rank(base, tmp_path):
    a, b = factors((64, 64), 4, 3)
    lora = write_adapter(tmp_path / "rs", peft_config(use_rslora=True), peft_pair(Q, a, b))
    fused = stored(make(base, tmp_path / "out", WIDE, adapter_path=lora)[0])
    assert close(fused[f"{Q}.weight"], wide(Q) + 8 / 2 * (b @ a))


def test_dora_scales_rows_to_the_magnitudes(base, tmp_path, monkeypatch):
    a, b = factors((64, 128), 4, 4)
    m = np.linspace(1, 9, 64, dtype=np.float32)
    tensors = peft_pair(DOWN, a, b) | {f"base_model.model.{DOWN}.lora_magnitude_vector": m}
    dora = write_adapter(tmp_path / "dora", peft_config(use_dora=True), tensors)
    monkeypatch.setattr("converter.execute.units.UNIT_BYTES", 5_000)  # several units a matrix
    fused = stored(make(base, tmp_path / "out", WIDE, adapter_path=dora)[0])
    direction = wide(DOWN) + 2 * (b @ a)
    expected = m[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    assert close(fused[f"{DOWN}.weight"], expected)


def test_tables_and_whole_tensors(base, tmp_path):
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((4, 96), np.float32), rng.standard_normal((64, 4), np.float32)
    norm, head = rng.standard_normal(64, np.float32), rng.standard_normal((96, 64), np.float32)
    prefix = "base_model.model."
    tensors = {
        f"{prefix}model.embed_tokens.lora_embedding_A": a,
        f"{prefix}model.embed_tokens.lora_embedding_B": b,
        f"{prefix}model.norm.weight": norm,
        f"{prefix}lm_head.base_layer.weight": head,
    } | peft_pair("lm_head", *factors((96, 64), 4, 6))
    config = peft_config(modules_to_save=["norm", "lm_head"])
    lora = write_adapter(tmp_path / "tables", config, tensors)
    fused = stored(make(base, tmp_path / "out", WIDE, adapter_path=lora)[0])
    assert close(fused["model.embed_tokens.weight"], wide("model.embed_tokens") + 2 * (b @ a).T)
    assert np.array_equal(fused["model.norm.weight"], norm)
    a, b = factors((96, 64), 4, 6)
    assert close(fused["lm_head.weight"], head + 2 * (b @ a))


def test_layers_stored_the_other_way_round(twin_of, tmp_path, monkeypatch):
    source = twin_of("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    weight = load_file(source / "model.safetensors")[f"{name}.weight"]  # [in, out]
    inp, out = weight.shape
    a, b = factors((out, inp), 4, 7)
    m = np.linspace(1, 3, out, dtype=np.float32)
    tensors = peft_pair(name, a, b) | {f"base_model.model.{name}.lora_magnitude_vector": m}
    config = peft_config(use_dora=True, fan_in_fan_out=True)
    dora = write_adapter(tmp_path / "dora", config, tensors)
    monkeypatch.setattr("converter.adapter.fusing._SLICE", 1_000)
    fused = stored(make(source, tmp_path / "out", WIDE, adapter_path=dora)[0])
    direction = weight.T + 2 * (b @ a)
    expected = m[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    assert close(fused["model.h.0.mlp.c_fc.weight"], expected)


def mlx_adapter(source, out, kind, keys, tmp_path):
    """An adapter as mlx-lm trains it, with random factors, and the model as mlx-lm fuses it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(out)
    settings = {"rank": 3, "scale": 1.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    rng = np.random.default_rng(8)
    tensors = {
        name: rng.standard_normal(value.shape, np.float32)
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in tensors.items()]))
    fused = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": "x/y"}
    folder = write_adapter(tmp_path / kind, config, tensors, "adapters.safetensors")
    return folder, {name: np.array(value) for name, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize(
    ("model_type", "kind", "keys"),
    [
        ("llama", "lora", ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]),
        ("llama", "dora", ["self_attn.v_proj", "model.embed_tokens"]),
        ("qwen3_moe", "lora", ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"]),
        ("gpt2", "dora", ["attn.c_attn"]),
    ],
)
def test_mlx_layout_gives_what_mlx_lm_fuses(runtimes, twin_of, model_type, kind, keys, tmp_path):
    source = twin_of(model_type)
    plain = make(source, tmp_path / "plain", WIDE)[0]
    folder, expected = mlx_adapter(source, plain, kind, keys, tmp_path)
    fused = stored(make(source, tmp_path / "fused", WIDE, adapter_path=folder)[0])
    before = stored(plain)
    assert fused.keys() == expected.keys()
    assert all(close(fused[name], expected[name]) for name in fused)
    changed = {name for name in fused if fused[name].tobytes() != before[name].tobytes()}
    assert len(changed) == len(load_file(folder / "adapters.safetensors")) // (
        3 if kind == "dora" else 2
    )


def test_tied_tables_change_together(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = llama_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = write_release(tmp_path / "base", config, tensors)
    table = np.ones((96, 64), np.float32)
    saved = {"base_model.model.model.embed_tokens.weight": table}
    lora = write_adapter(tmp_path / "saved", peft_config(), saved)
    out = make(base, tmp_path / "out", WIDE, adapter_path=lora)[0]
    assert np.array_equal(stored(out)["model.embed_tokens.weight"], table)
    a, b = factors((64, 96), 4, 11)
    name = "base_model.model.model.embed_tokens.lora_embedding"
    pair = write_adapter(tmp_path / "pair", peft_config(), {f"{name}_A": a, f"{name}_B": b})
    out = make(base, tmp_path / "both", WIDE, adapter_path=pair)[0]
    expected = wide("model.embed_tokens") + 2 * (b @ a).T
    assert close(stored(out)["model.embed_tokens.weight"], expected)
    head = write_adapter(
        tmp_path / "head", peft_config(), {"base_model.model.lm_head.weight": table}
    )
    with pytest.raises(
        PlanError, match=r"adapts lm_head\.weight, which the conversion drops: tied"
    ):
        plan_request(Request(hf_path=str(base), adapter_path=head))


def test_proof_runs_on_the_fused_weights(runtimes, twin_of, tmp_path, capsys):
    source = twin_of("llama", "bfloat16")
    shape = load_file(source / "model.safetensors")[f"{Q}.weight"].shape
    a, b = factors(shape, 4, 9)
    lora = write_adapter(tmp_path / "tuned", peft_config(), peft_pair(Q, a / 8, b / 8))
    out = tmp_path / "out"
    recipe = Options(quant=QuantSpec.make("affine", 8, 32))
    request = Request(hf_path=str(source), mlx_path=out, recipes=(recipe,), adapter_path=lora)
    done = convert(request, QUIET)[0]
    with done.reference(workers=1) as reference:
        report = prove(out, source=reference, console=QUIET, plan=done.plan)
    assert report["verdict"] == "pass"
    losses = [c["metrics"]["kl_mean"] for c in report["checks"] if c["name"] == "loss"]
    assert losses
    assert all(loss < 0.01 for loss in losses)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tuned"]
    assert status("validate", "--hf-path", source, "--mlx-path", out) == 2
    assert "tuned is fused into it; give it as --adapter-path" in capsys.readouterr().err
    other = write_adapter(tmp_path / "other", peft_config(), peft_pair(Q, a, b))
    given = ("--hf-path", source, "--mlx-path", out, "--adapter-path", other)
    assert status("validate", *given) == 2
    assert "is not the adapter tuned" in capsys.readouterr().err


def test_calibration_runs_on_the_fused_weights(twin_of, tmp_path, monkeypatch):
    from quant.calibrate.text import calibration_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = twin_of("llama", "bfloat16")
    shape = load_file(source / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"].shape
    pair = peft_pair("model.layers.0.self_attn.v_proj", *factors(shape, 4, 10))
    lora = write_adapter(tmp_path / "tuned", peft_config(), pair)
    recipe = Options(
        quant=QuantSpec.make("affine", 4, 32, "imatrix"),
        calibration=calibration_of(None, sequences=2, length=16),
    )
    make(source, tmp_path / "plain", recipe)
    (plain,) = statistics_in(tmp_path / "cache")
    make(source, tmp_path / "fused", recipe, adapter_path=lora)
    found = statistics_in(tmp_path / "cache")
    assert len(found) == 2
    name = "model.layers.0.self_attn.o_proj"  # sees what v_proj computes
    assert any(not np.allclose(one[name], plain[name], rtol=0.1) for one in found)


def statistics_in(cache):
    """The arrays of every set of statistics in a cache, by name."""
    return [
        {n: a for file in folder.glob("part-*") for n, a in load_file(file).items()}
        for folder in cache.rglob("*.moments")
    ]


def test_plan_manifest_and_card_say_which_adapter(base, lora, tmp_path):
    from converter.publish import write_card

    plain = plan_request(Request(hf_path=str(base))).plans[0]
    plan = plan_request(Request(hf_path=str(base), adapter_path=lora)).plans[0]
    tensors = load_file(lora / "adapter_model.safetensors")
    first = next(iter(tensors))
    other = write_adapter(
        tmp_path / "again" / "tuned",
        json.loads((lora / "adapter_config.json").read_text()),
        tensors | {first: tensors[first] * 2},
    )
    again = plan_request(Request(hf_path=str(base), adapter_path=other)).plans[0]
    assert len({plain.hash, plan.hash, again.hash}) == 3
    out = make(base, tmp_path / "out", Options(), adapter_path=lora)[0]
    told = json.loads((out / "conversion.json").read_text())["source"]["adapter"]
    assert (told["name"], told["base_model"], len(told["files"])) == ("tuned", "base", 2)
    card = write_card(out).read_text()
    assert "adapter tuned" in card
    assert "on 2 matrices" in card
    assert (
        stored(out)[f"{Q}.weight"].dtype
        == stored(make(base, tmp_path / "bf16")[0])[f"{Q}.weight"].dtype
    )


def test_another_base_is_a_note(base, tmp_path):
    config = peft_config(base_model_name_or_path="meta-llama/Llama-3")
    lora = write_adapter(tmp_path / "l", config, peft_pair(Q, *factors((64, 64), 4, 1)))
    plan = plan_request(Request(hf_path=str(base), adapter_path=lora)).plans[0]
    assert "the adapter says it was trained on meta-llama/Llama-3; it is fused into base" in (
        plan.notes
    )


A, B = factors((64, 64), 4, 1)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, peft_pair("model.layers.9.self_attn.q_proj", A, B), "has no such matrix"),
        ({}, peft_pair(Q, A, B[:32]), r"q_proj.lora_B.weight is \[32, 4\], but rank 4"),
        ({"r": 8}, peft_pair(Q, A, B), "rank 8 on this release"),
        ({}, {f"base_model.model.{Q}.lora_A.weight": A}, "is not a pair of factors"),
        ({}, {f"{Q}.lora_A.weight": A}, r"does not begin with base_model\.model\."),
        ({"use_dora": True}, peft_pair(Q, A, B), "needs a magnitude vector"),
        (
            {},
            peft_pair(Q, A, B) | {f"base_model.model.{Q}.lora_magnitude_vector": B[:, 0]},
            "has a magnitude vector, but use_dora is false",
        ),
        ({}, {"base_model.model.model.extra.weight": A}, r"has no tensor model\.extra\.weight"),
        ({}, {"base_model.model.lm_head.weight": A}, r"\[96, 64\]"),
        ({}, {f"base_model.model.{Q}.lora_B.bias": B[:, 0]}, "no tensor of a plain LoRA"),
        ({"peft_type": "LOHA"}, peft_pair(Q, A, B), "only LORA can be fused"),
        ({"alora_invocation_tokens": [1]}, peft_pair(Q, A, B), "alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa_niter_4"}, peft_pair(Q, A, B), "changed the base model"),
        ({"rank_pattern": {"(": 2}}, peft_pair(Q, A, B), "of pattern"),
        ({}, peft_pair(Q, A.astype(np.int32), B), "floats are expected"),
    ],
)
def test_tensors_without_a_place_are_named(base, tmp_path, config, tensors, message):
    lora = write_adapter(tmp_path / "bad", peft_config(**config), tensors)
    with pytest.raises(PlanError, match=message):
        plan_request(Request(hf_path=str(base), adapter_path=lora))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"fine_tune_type": "full"}, {"m.m": A}, "no adapter to fuse"),
        ({"lora_parameters": {"rank": 4, "alpha": 1}}, {f"{Q}.lora_a": A}, "rank and scale"),
        ({}, {"model.nothing.lora_a": A, "model.nothing.lora_b": B}, "no module of this model"),
        ({}, {f"{Q}.lora_a": A.T, f"{Q}.lora_b": B.T, f"{Q}.m": A[0]}, "has lora_a, lora_b, m"),
        ({}, {f"{Q}.lora_a": A.T, f"{Q}.lora_b": B[:3].T}, r"lora_b is \[4, 3\], but rank 4"),
        ({}, {f"{Q}.scale": A}, "is not one of lora_a, lora_b, m"),
    ],
)
def test_mlx_tensors_without_a_place_are_named(base, tmp_path, config, tensors, message):
    whole = {"lora_parameters": {"rank": 4, "scale": 2.0}} | config
    lora = write_adapter(tmp_path / "bad", whole, tensors, "adapters.safetensors")
    with pytest.raises(PlanError, match=message):
        plan_request(Request(hf_path=str(base), adapter_path=lora))


def test_folders_that_are_no_adapter(base, lora, tmp_path):
    for path in (tmp_path / "absent", base):
        with pytest.raises(UsageError, match="--adapter-path"):
            plan_request(Request(hf_path=str(base), adapter_path=path))
    mlx = make(base, tmp_path / "mlx", Options())[0]
    with pytest.raises(UsageError, match="fused into a torch release"):
        plan_request(Request(hf_path=str(mlx), dequantize=True, adapter_path=lora))
