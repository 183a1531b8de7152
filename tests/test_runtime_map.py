"""Conversions without a written map: by a runtime's loader, by the user's map and model code."""

import json

import pytest
from header_fixtures import fixtures
from safetensors.numpy import load_file, save_file

from arch_maps.registry import find
from converter.cli.errors import run
from converter.errors import PlanError, UsageError
from converter.maps import MapChoice
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options, build_plan
from converter.plan.match import match_release
from converter.proof import prove
from converter.runtime_map import runtime_map
from converter.ui import Console
from quant.recipe import QuantSpec

pytestmark = pytest.mark.usefixtures("runtimes")
QUIET = Console(quiet=True)
BY_RUNTIME = MapChoice(runtime=True)
FOUR_BIT = Options(quant=QuantSpec.make("affine", 4, 64))
UNKNOWN = "qwen3_of_tomorrow"
MODEL = "from mlx_lm.models.qwen3 import Model, ModelArgs\n"
MAP = (
    "from dataclasses import replace\n\nfrom arch_maps.registry import find\n\n"
    f'MAP = replace(find("qwen3"), model_type="{UNKNOWN}")\n'
)


def command(*words):
    from converter.cli.app import cli

    return run(lambda: cli.main([str(word) for word in words], standalone_mode=False))


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen3_vl"])
def test_the_bytes_are_those_of_the_written_map(model_type, twin_of, tmp_path):
    source = str(twin_of(model_type))
    for name, maps in (("written", MapChoice()), ("runtime", BY_RUNTIME)):
        out = tmp_path / name
        request = Request(hf_path=source, mlx_path=out, recipes=(FOUR_BIT,), maps=maps)
        convert(request, QUIET)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("written", "runtime")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert value.tobytes() == files[1][name].tobytes(), name
    configs = [
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("written", "runtime")
    ]
    assert configs[0]["quantization"] == configs[1]["quantization"]


def test_a_type_without_a_map_is_converted_and_proven(twin_of, tmp_path, monkeypatch):
    """As on the day of a release: the registry does not know the type, the runtimes do."""
    monkeypatch.setattr("converter.plan.match.find", lambda model_type: None)
    monkeypatch.setattr("converter.publish.find", lambda model_type: None)
    source, out = twin_of("qwen3"), tmp_path / "out"
    with pytest.raises(PlanError, match="no map for model_type 'qwen3'"):
        plan_request(Request(hf_path=str(source)))
    request = Request(hf_path=str(source), mlx_path=out, recipes=(FOUR_BIT,), maps=BY_RUNTIME)
    (done,) = convert(request, QUIET)
    report = prove(out, source=source, console=QUIET, plan=done.plan, arch=done.arch)
    assert report["verdict"] == "pass"
    told = done.manifest.data["map"]
    assert told["by"] == "runtime"
    assert told["runtime"] == "mlx_lm"
    assert told["runtimes"] == ["mlx-lm", "mlx-vlm"]
    assert any("--map runtime" in note for note in done.manifest.data["notes"])
    from converter.publish import write_card

    assert "made by the loader of mlx-lm" in write_card(out).read_text()
    # What was made so is judged so again, and has no way back.
    assert command("validate", "--hf-path", source, "--mlx-path", out) == 0
    assert command("--hf-path", out, "--to", "torch", "--mlx-path", tmp_path / "back") == 3


def test_what_the_loader_leaves_out_is_listed():
    fixture = next(f for f in fixtures() if f.id == "llama/Llama-2-7b-hf")
    source = fixture.source()
    match = match_release(source, runtime_map(source))
    assert len(match.drops) == 32
    assert match.drops[0].reason.startswith("the loader of mlx-")
    written = match_release(source, find("llama"))
    assert {rule.target for rule in match.rules} == {rule.target for rule in written.rules}
    assert {r.target: r.kind for r in match.rules} == {r.target: r.kind for r in written.rules}


def test_a_tied_head_must_still_equal_the_table():
    fixture = next(f for f in fixtures() if f.id == "qwen3/Qwen3-0.6B")
    (drop,) = match_release(fixture.source(), runtime_map(fixture.source())).drops
    assert (drop.name, drop.same_as) == ("lm_head.weight", "model.embed_tokens.weight")


def test_a_plan_of_full_size_reads_no_weights():
    fixture = next(f for f in fixtures() if f.id == "mixtral/Mixtral-8x7B-v0.1")
    source = fixture.source()
    plan = build_plan(source, match_release(source, runtime_map(source)), FOUR_BIT)
    assert plan.parameters == 46_702_792_704
    assert plan.map["by"] == "runtime"
    gates = [o for o in plan.outputs if o.rule.target.endswith("block_sparse_moe.gate.weight")]
    assert {out.quant for out in gates} == {None}


def test_a_written_map_leaves_plans_as_they_were(twin_of):
    plan = plan_request(Request(hf_path=str(twin_of("qwen3")))).plans[0]
    assert plan.map is None
    assert "map" not in plan.to_json()


# Refusals


def test_a_release_that_no_runtime_knows_is_refused(twin_of, tmp_path, capsys):
    renamed = renamed_twin(twin_of, tmp_path)
    assert command("--hf-path", renamed, "--map", "runtime", "--mlx-path", tmp_path / "o") == 3
    assert "no stock runtime has a model for model_type" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_release_with_a_surplus_tensor_is_refused_in_the_runtimes_words(twin_of, tmp_path):
    folder = tmp_path / "twin"
    copy_tree(twin_of("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.adapter.weight"] = tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"--map runtime: mlx_lm cannot run .*adapter\.weight"):
        plan_request(Request(hf_path=str(folder), maps=BY_RUNTIME))


def test_a_config_that_tells_of_codes_that_are_not_there_is_refused(twin_of, tmp_path):
    folder = tmp_path / "twin"
    copy_tree(twin_of("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match="says awq, but no tensor is quantized so"):
        plan_request(Request(hf_path=str(folder), maps=BY_RUNTIME))


# A model that no runtime has


def copy_tree(source, folder):
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def renamed_twin(twin_of, tmp_path):
    folder = tmp_path / "renamed"
    copy_tree(twin_of("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": UNKNOWN}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# transformers warns of a type that it does not know, before it takes it for a plain config.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_model_code_and_a_map_make_a_proven_checkpoint(twin_of, tmp_path, capsys):
    source, out = renamed_twin(twin_of, tmp_path), tmp_path / "out"
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "map.py").write_text(MAP)
    own = ("--map-file", tmp_path / "map.py", "--model-file", tmp_path / "model.py")
    assert command("--hf-path", source, "--mlx-path", out, *own, "--quiet") == 0
    told = capsys.readouterr().out
    assert "parity: pass" in told
    assert "mlx-lm" in told
    assert "mlx-vlm" not in told  # the code has no ModelConfig
    assert json.loads((out / "config.json").read_text())["model_file"] == "model.py"
    assert (out / "model.py").read_text() == MODEL
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["map"]["by"] == "file"
    assert manifest["map"]["model_file"] == "model.py"
    assert manifest["files"]["model.py"]["bytes"] == len(MODEL)
    assert "brings its own model code, model.py" in (out / "README.md").read_text()
    assert command("verify", out) == 0
    (out / "model.py").write_text(MODEL + "\n")
    assert command("verify", out) == 1
    # Another's code runs only where the user says so.
    (out / "model.py").write_text(MODEL + "# changed\n")
    judge = ("validate", "--hf-path", source, "--mlx-path", out)
    assert command(*judge) == 2
    assert command(*judge, "--map-file", tmp_path / "map.py") == 4
    assert command(*judge, "--map-file", tmp_path / "map.py", "--trust-remote-code") == 0


def test_model_code_is_followed_by_its_loader_without_a_map(twin_of, tmp_path):
    source = renamed_twin(twin_of, tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    choice = MapChoice(runtime=True, model_file=tmp_path / "model.py")
    planned = plan_request(Request(hf_path=str(source), maps=choice))
    assert planned.plans[0].config["model_file"] == "model.py"
    assert planned.arch.runtimes == ("mlx-lm",)


def test_the_output_of_such_a_map_is_proven_against_the_code(twin_of, tmp_path):
    """The map names a parameter that the model code does not have: refused before writing."""
    source = renamed_twin(twin_of, tmp_path)
    (tmp_path / "model.py").write_text(
        MODEL + "ModelArgs = type('ModelArgs', (ModelArgs,), {'tie_word_embeddings': False})\n"
        "_Stock = Model\n\n\nclass Model(_Stock):\n    def __init__(self, args):\n"
        "        super().__init__(args)\n        import mlx.nn as nn\n\n"
        "        self.more = nn.Linear(4, 4)\n"
    )
    (tmp_path / "map.py").write_text(MAP)
    choice = MapChoice(file=tmp_path / "map.py", model_file=tmp_path / "model.py")
    with pytest.raises(PlanError, match=r"not be loaded as they are .*more\.weight"):
        plan_request(Request(hf_path=str(source), maps=choice))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime": True, "file": "map.py"}, "two maps"),
        ({"file": "absent.py"}, "--map-file .*absent.py: no such file"),
        ({"model_file": "absent.py"}, "--model-file .*absent.py: no such file"),
    ],
)
def test_contradictions_are_usage_errors(given, message, tmp_path):
    (tmp_path / "map.py").write_text(MAP)
    paths = {k: tmp_path / v if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(UsageError, match=message):
        MapChoice(**paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MAP = 1\n", "defines no MAP"),
        ("raise RuntimeError('no')\n", "RuntimeError: no"),
        (MAP.replace(UNKNOWN, "other"), "is for model_type 'other'"),
    ],
)
def test_a_map_file_that_is_none_is_refused(text, message, twin_of, tmp_path):
    (tmp_path / "map.py").write_text(text)
    choice = MapChoice(file=tmp_path / "map.py")
    with pytest.raises(PlanError, match=message):
        plan_request(Request(hf_path=str(twin_of("qwen3")), maps=choice))


def test_code_without_a_model_is_refused_and_not_run(twin_of, tmp_path):
    (tmp_path / "model.py").write_text("raise SystemExit('was run')\n")
    choice = MapChoice(model_file=tmp_path / "model.py")
    with pytest.raises(UsageError, match="defines neither Model and ModelConfig"):
        plan_request(Request(hf_path=str(twin_of("qwen3")), maps=choice))
