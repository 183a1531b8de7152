"""Values rotated offline: the same model, other values in its cache, and refusals from headers."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from arch_maps.facts import Facts
from arch_maps.inverse import invert
from arch_maps.ops import HeadHadamard, Source, describe, evaluate, exact, streamable
from arch_maps.registry import find
from converter.errors import PlanError, UsageError
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options, rotate
from converter.ui import Console
from validate.twin import load_example

QUIET = Console(quiet=True)
ROTATED = Options(rotate_values=True)


class Arrays(dict):
    def read_rows(self, name, start, stop):
        return self[name][start:stop]


# The op


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_hadamard_of_heads_is_the_matrix_product(dtype):
    from scipy.linalg import hadamard

    x = np.random.default_rng(0).standard_normal((24, 16)).astype(dtype)
    reader, matrix = Arrays(x=x), hadamard(8) / np.sqrt(8)
    rows = HeadHadamard(Source("x", (24, 16)), 0, 8)
    columns = HeadHadamard(Source("x", (24, 16)), 1, 8)
    wide = x.astype(np.float64)
    wanted = (matrix @ wide.reshape(3, 8, 16)).reshape(24, 16)
    np.testing.assert_allclose(evaluate(rows, reader), wanted, atol=1e-6)
    wanted = (wide.reshape(24, 2, 8) @ matrix).reshape(24, 16)
    np.testing.assert_allclose(evaluate(columns, reader), wanted, atol=1e-6)
    assert describe(rows) == "hadamard(x, axis=0, heads of 8)"
    assert streamable(rows)
    assert not exact(rows)


@pytest.mark.parametrize("axis", [0, 1])
def test_any_rows_have_the_same_bits_and_twice_is_nothing(axis):
    x = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)
    reader = Arrays(x=x, y=None)
    op = HeadHadamard(Source("x", (32, 32)), axis, 16)
    whole = evaluate(op, reader)
    parts = [evaluate(op, reader, at, min(at + 5, 32)) for at in range(0, 32, 5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    back = invert([(Source("y", (32, 32)), op)])["x"]
    np.testing.assert_allclose(evaluate(back, Arrays(y=whole)), x, atol=1e-6)


def test_a_bias_turns_with_its_rows():
    reader = Arrays(b=np.arange(8, dtype=np.float32))
    turned = evaluate(HeadHadamard(Source("b", (8,)), 0, 4), reader)
    np.testing.assert_allclose(turned, [3, -1, -2, 0, 11, -1, -2, 0], atol=1e-6)


# The model


def logits(folder):
    from validate.runtime import MlxRuntime

    model = MlxRuntime.load(folder, runtime="mlx_lm")
    return np.array(model.logits(list(range(5, 45))))


@pytest.fixture(scope="module")
def pair(twin_of, tmp_path_factory):
    """A Qwen2 twin (grouped queries, biases on values) converted both ways, in float32."""
    from validate.runtime import prepare_mlx

    prepare_mlx()
    place = tmp_path_factory.mktemp("rotated")
    made = []
    for name, options in (("plain", Options()), ("rotated", ROTATED)):
        request = Request(hf_path=str(twin_of("qwen2")), mlx_path=place / name, recipes=(options,))
        made += convert(request, QUIET)
    return made


def test_the_model_computes_the_same_from_other_values(pair):
    plain, rotated = (one.folder for one in pair)
    wanted, found = logits(plain), logits(rotated)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    from safetensors.numpy import load_file

    weights = [load_file(folder / "model.safetensors") for folder in (plain, rotated)]
    changed = {name for name in weights[0] if not np.array_equal(*(w[name] for w in weights))}
    ends = {name.split("self_attn.")[1] for name in changed}
    assert ends == {"v_proj.weight", "v_proj.bias", "o_proj.weight"}


def test_it_passes_the_gate_against_torch(pair, twin_of):
    from converter.proof import prove

    _, rotated = pair
    report = prove(rotated.folder, source=twin_of("qwen2"), console=QUIET, plan=rotated.plan)
    assert report["verdict"] == "pass"


def test_plan_manifest_and_card_say_so(pair):
    from converter.publish import write_card

    plain, rotated = pair
    assert plain.plan.hash != rotated.plan.hash
    assert plan_request(Request(hf_path=str(plain.release.root))).plans[0].hash == plain.plan.hash
    recipe = json.loads((rotated.folder / "conversion.json").read_text())["recipe"]
    assert recipe["rotate_values"] is True
    assert rotated.manifest.rotated
    assert not plain.manifest.rotated
    said = "layers are rotated: value projections make"
    assert any(said in note for note in rotated.plan.notes)
    assert said in write_card(rotated.folder).read_text()


def test_torch_gets_the_release_back(pair, twin_of, tmp_path):
    from safetensors.numpy import load_file

    back = Request(
        hf_path=str(pair[1].folder), mlx_path=tmp_path / "b", recipes=(Options(target="torch"),)
    )
    convert(back, QUIET)
    found = load_file(tmp_path / "b" / "model.safetensors")
    for name, wanted in load_file(twin_of("qwen2") / "model.safetensors").items():
        np.testing.assert_allclose(found[name], wanted, atol=2e-6, err_msg=name)
    kept = plan_request(replace(back, recipes=(Options(),), dequantize=True)).plans[0]
    assert kept.options.rotate_values
    with pytest.raises(UsageError, match="starts from a torch release"):
        plan_request(replace(back, recipes=(ROTATED,), dequantize=True))


# Where it is not legal


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt_oss", r"layers\.\{0-23\}\.self_attn: sinks may touch values before o_proj"),
        ("qwen3_5", "a gate multiplies what attention gives, channel by channel"),
        ("minicpmv4_6", "a gate multiplies what attention gives"),
        ("gemma4", "values are normalised, and layers share them"),
        ("deepseek_v3", "values are made from a latent vector"),
        ("afmoe", "gate_proj may touch values before o_proj"),
        ("phi", "a head has 80 channels, which is no power of two"),
        ("phi3", "does not say that its attention layers only add values up"),
    ],
)
def test_other_attention_is_refused_with_the_reason(model_type, reason):
    arch = find(model_type)
    made = arch.expand(Facts(load_example(model_type)), arch.layouts[0])
    with pytest.raises(PlanError, match=f"--kv-rotate-values: .*{reason}"):
        rotate.values(made.rules, made.values)


def test_the_command_refuses_before_it_writes(twin_of, tmp_path, capfd):
    from converter.cli.app import cli
    from converter.cli.errors import run

    out = tmp_path / "out"
    arguments = ["--hf-path", str(twin_of("qwen3_5")), "--mlx-path", str(out)]
    arguments += ["--kv-rotate-values", "--no-validate"]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 3
    assert "a gate multiplies" in capfd.readouterr().err
    assert not out.exists()
