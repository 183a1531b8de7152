"""Faulty releases: exit 3 with every problem named, and nothing written."""

import json

import numpy as np
import pytest
from release_helpers import LLAMA, llama_tensors, status, write_release

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
GATES = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert a release that must be refused; returns the problems, one per line."""

    def go(config=LLAMA, tensors=None, *flags, damage=None):
        source = write_release(tmp_path / "in" / "release", config, tensors)
        if damage:
            damage(source)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        target = out / "mlx"
        code = status("--hf-path", source, "--mlx-path", target, "--no-validate", "--quiet", *flags)
        streams = capsys.readouterr()
        assert code == 3, streams.err
        assert streams.out == ""
        assert "Traceback" not in streams.err
        left = [path for path in out.rglob("*") if path != target or path.is_file()]
        assert left == [], "something was written"
        first, *problems = streams.err.splitlines()
        assert first == "The release cannot be converted:"
        return [line.removeprefix("  ") for line in problems]

    return go


def changed(**tensors):
    return llama_tensors(LLAMA) | tensors


def without(*names):
    return {name: x for name, x in llama_tensors(LLAMA).items() if name not in names}


def holding(value, *names):
    tensors = llama_tensors(LLAMA)
    for name in names:
        tensors[name].reshape(-1)[65 % tensors[name].size] = value
    return tensors


def test_missing_surplus_and_wrong_shape_are_named_at_once(refused):
    tensors = without(*GATES, "lm_head.weight")
    tensors |= {"lm_haed.weight": np.zeros((96, 64), np.float32), DOWN: np.zeros((3, 5), np.int8)}
    problems = refused(LLAMA, tensors)
    assert problems == [
        "missing: model.layers.{0-1}.mlp.gate_proj.weight (2 tensors)",
        "missing: lm_head.weight (did you mean lm_haed.weight?)",
        "surplus: lm_haed.weight [96, 64] in model.safetensors: the map for this type has no use "
        "for it (did you mean lm_head.weight?)",
        f"wrong shape: {DOWN} is [3, 5] in model.safetensors, but config.json makes it "
        "[hidden_size=64, intermediate_size=128]",
    ]


def test_integer_weights_are_refused_by_name(refused):
    ones = np.ones((64, 128), np.int8)
    [problem] = refused(LLAMA, changed(**{DOWN: ones}))
    assert problem.startswith(f"{DOWN}: made from I8")


@pytest.mark.parametrize(
    "flags", [(), ("-q",), ("--dtype", "float16"), ("--variants", "bf16,4bit")]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_every_tensor_that_is_not_finite_is_named(refused, value, flags):
    problems = refused(LLAMA, holding(value, DOWN, NORM, *GATES), *flags)
    places = {DOWN: "row 0, column 65", NORM: "row 1, column 0"}
    places |= dict.fromkeys(GATES, "row 1, column 1")
    assert problems == [
        f"not finite: {name}, {place} is NaN or infinite; the release is damaged or unfinished"
        for name, place in sorted(places.items())
    ]


def test_one_line_for_each_tensor_however_many_places(refused, monkeypatch):
    from converter.execute import units

    monkeypatch.setattr(units, "UNIT_BYTES", 128)
    tensors = llama_tensors(LLAMA)
    tensors[DOWN][3:, 5] = np.nan
    tensors[NORM][:] = np.inf
    problems = refused(LLAMA, tensors, "-q", "--workers", "5")
    assert [line.split(" is ")[0] for line in problems] == [
        f"not finite: {DOWN}, row 3, column 5",
        f"not finite: {NORM}, row 0, column 0",
    ]


def test_overflow_of_float16_says_where_and_what_to_do(refused):
    [problem] = refused(LLAMA, holding(1e5, DOWN), "--dtype", "float16")
    assert problem == (
        f"out of range: {DOWN}, row 0, column 65 is 99840.0, too large for F16; use another --dtype"
    )


def test_truncated_shard(refused):
    def cut(source):
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    [problem] = refused(damage=cut)
    size = int(problem.rpartition(" ")[2])
    assert problem == (
        "model.safetensors: model.norm.weight: truncated: its data ends at byte "
        f"{size + 10} of {size}"
    )


def test_unknown_type_names_near_ones(refused):
    [problem] = refused(LLAMA | {"model_type": "qwen3_6"})
    assert problem.startswith("config.json: no map for model_type 'qwen3_6'; similar: qwen3")
    assert "convert maps list" in problem


@pytest.mark.parametrize("value", [None, 7, ["llama"]])
def test_type_that_is_no_name(refused, value):
    [problem] = refused(LLAMA | {"model_type": value})
    assert problem == "config.json: model_type is missing, so no map can be chosen"


def test_missing_and_wrong_config_keys_are_named_at_once(refused):
    config = {k: v for k, v in LLAMA.items() if k not in ("hidden_size", "vocab_size")}
    problems = refused(config | {"tie_word_embeddings": "no"}, llama_tensors(LLAMA))
    assert problems == [
        "config.json does not state hidden_size",
        "config.json does not state vocab_size",
        "config.json: tie_word_embeddings must be true or false, not 'no'",
    ]


@pytest.mark.parametrize("layers", [4097, 10**12])
def test_hostile_layer_count(refused, layers):
    problems = refused(LLAMA | {"num_hidden_layers": layers}, llama_tensors(LLAMA))
    assert len(problems) == 1
    assert "num_hidden_layers" in problems[0]


def test_quantized_release(refused):
    config = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    [problem] = refused(config)
    assert problem == "config.json: says gptq, but no tensor is quantized so"


def test_mlx_checkpoint_needs_a_flag(refused, tmp_path):
    def as_mlx(source):
        from safetensors.numpy import load_file, save_file

        file = source / "model.safetensors"
        save_file(load_file(file), file, metadata={"format": "mlx"})

    [problem] = refused(damage=as_mlx)
    assert "already an MLX checkpoint" in problem


def test_nothing_to_quantize(refused):
    config = LLAMA | {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 2}
    assert refused(config, None, "-q") == [
        "-q: no tensor of this release can be quantized with this recipe"
    ]


def test_not_a_release(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, words in (
        ("empty", "no weights found"),
        ("file", "is a file"),
        ("absent/x/y", "no such folder"),
    ):
        assert status("--hf-path", tmp_path / path, "--no-validate") == 3
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("~nosuchuser/x", "this machine has no such user"),
        ("https://huggingface.co/org/name", "give the hub id org/name"),
        (
            "https://huggingface.co/org/name/tree/refs%2Fpr%2F1/sub",
            "give the hub id org/name with --revision refs/pr/1",
        ),
        ("huggingface.co/org/name", "give the hub id org/name"),
        ("hf://org/name.v1", "give the hub id org/name.v1"),
        ("https://huggingface.co/datasets/org/name", "no such folder, and not a hub id"),
    ],
)
def test_addresses_and_homes_of_nobody_are_named(tmp_path, capsys, given, told):
    out = tmp_path / "out"
    for words in (["plan"], ["--mlx-path", out]):
        assert status(*words, "--hf-path", given) == 3
        first, problem = capsys.readouterr().err.splitlines()
        assert first == "The release cannot be converted:"
        assert problem.startswith(f"  {given}: ")
        assert (
            problem.removeprefix(f"  {given}: ").removeprefix("is a web address; ").startswith(told)
        )
    assert not out.exists()


def test_damage_found_while_reading_leaves_nothing(tmp_path, capsys, monkeypatch):
    """A weight file that changes between planning and reading."""
    from converter import pipeline

    source = write_release(tmp_path / "in" / "release")
    plan = pipeline.plan_request

    def plan_then_cut(request, *given, **more):
        planned = plan(request, *given, **more)
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        return planned

    monkeypatch.setattr(pipeline, "plan_request", plan_then_cut)
    out = tmp_path / "out"
    assert status("--hf-path", source, "--mlx-path", out / "mlx", "--no-validate") == 3
    assert "changed since it was planned" in capsys.readouterr().err
    assert list(out.iterdir()) == []


class TestTiedHead:
    """A tied release may hold its head too, if it is the embedding."""

    CONFIG = LLAMA | {"tie_word_embeddings": True}

    def test_equal_is_dropped_and_restored(self, tmp_path):
        from release_helpers import make, stored

        tensors = llama_tensors(self.CONFIG)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        source = write_release(tmp_path / "in", self.CONFIG, tensors)
        [out] = make(source, tmp_path / "out")
        assert sorted(stored(out)) == sorted(set(tensors) - {"lm_head.weight"})
        drops = json.loads((out / "conversion.json").read_text())["drops"]
        assert [d["name"] for d in drops] == ["lm_head.weight"]
        assert "tied" in drops[0]["reason"]

    def test_different_is_refused(self, refused):
        tensors = llama_tensors(self.CONFIG)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1
        [problem] = refused(self.CONFIG, tensors)
        assert problem == (
            "not tied: lm_head.weight differs from model.embed_tokens.weight, although "
            "config.json ties them; set tie_word_embeddings to false if both are meant"
        )
