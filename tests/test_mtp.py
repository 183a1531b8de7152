"""Drafters made of a release's own further-token layers."""

import json

import numpy as np
import pytest
from mtp_twins import make_agreeing_dflash, make_agreeing_twin, make_mtp_twin
from safetensors.numpy import load_file, save_file

from converter.cli.errors import run
from converter.errors import PlanError
from converter.pipeline import Request, convert, plan_request
from converter.plan import Options
from converter.proof import prove_drafter
from converter.ui import Console
from quant.recipe import QuantSpec
from validate.speculative import TOKENS, judge_drafter

pytestmark = pytest.mark.usefixtures("runtimes")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return make_mtp_twin("qwen3_5", tmp_path_factory.mktemp("mtp") / "twin")


@pytest.fixture(scope="module")
def pair(twin, tmp_path_factory):
    """The converted twin and its drafter."""
    out = tmp_path_factory.mktemp("converted") / "out"
    return convert(Request(hf_path=str(twin), mlx_path=out, mtp=True), QUIET)


def test_the_drafter_has_the_tensors_of_the_stock_splitter(twin, pair, tmp_path):
    from mlx_vlm.split_mtp import split_mtp

    split_mtp(str(twin), str(tmp_path / "stock"))
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    ours = load_file(pair[1].folder / "model.safetensors")
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        np.testing.assert_array_equal(ours[name].view(np.uint32), value.view(np.uint32), name)
    config = json.loads((pair[1].folder / "config.json").read_text())
    theirs = json.loads((tmp_path / "stock" / "config.json").read_text())
    for key in ("model_type", "block_size", "tie_word_embeddings"):
        assert config[key] == theirs[key]


def test_the_drafter_is_an_output_like_any_other(twin, pair):
    model, drafter = pair
    assert drafter.folder == model.folder.with_name("out-mtp")
    assert drafter.target == model.folder
    told = drafter.manifest.data
    assert told["map"]["by"] == "runtime"
    assert told["map"]["drafter_of"] == "qwen3_5"
    assert any("loads it with --draft-model" in note for note in told["notes"])
    assert "tokenizer.json" in told["files"]
    assert (drafter.folder / "model.safetensors.index.json").is_file()
    # What is a drafter of its own is no part of the model.
    reasons = {drop["reason"] for drop in model.manifest.data["drops"]}
    assert any("drafter" in reason for reason in reasons)


def test_norms_are_shifted_once(twin, pair):
    release = load_file(twin / "model.safetensors")["mtp.norm.weight"]
    drafted = load_file(pair[1].folder / "model.safetensors")["norm.weight"]
    np.testing.assert_array_equal(drafted, release + np.float32(1))


def test_speculative_decoding_writes_the_same_text(pair):
    model, drafter = pair
    report = prove_drafter(drafter.folder, target=model.folder, console=QUIET)
    assert report["verdict"] == "pass"
    drafted = next(check for check in report["checks"] if check["name"] == "drafted")
    assert drafted["metrics"]["prompts"] >= 8
    assert drafted["metrics"]["rounds"] > 0


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory):
    """A converted twin and its drafter by how loud the layers are that set them apart."""

    def made(stray, **settings):
        root = tmp_path_factory.mktemp("agreeing")
        twin = make_agreeing_twin(root / "twin", stray=stray, **settings)
        return twin, convert(Request(hf_path=str(twin), mlx_path=root / "out", mtp=True), QUIET)

    return made


def drafted(drafter, model):
    """The drafting row of a pair: how many rounds, and how many drafts were accepted."""
    report = judge_drafter(drafter.folder, target=model.folder, plan=None)
    assert report.verdict == "pass"
    row = next(check for check in report.checks if check.name == "drafted")
    assert all(case.metrics["tokens"] == case.metrics["equal"] == TOKENS for case in row.cases)
    return row.metrics


def test_text_is_the_same_where_every_draft_is_accepted(agreeing):
    _, (model, drafter) = agreeing(0.0)
    found = drafted(drafter, model)
    assert found["accepted"] == 2 * found["rounds"]  # a block of three: the token known and two
    assert found["rounds"] < found["prompts"] * TOKENS / 2


def test_text_is_the_same_where_some_drafts_are_accepted(agreeing):
    _, (model, drafter) = agreeing(0.02)
    found = drafted(drafter, model)
    assert found["rounds"] / 4 < found["accepted"] < 2 * found["rounds"]


def test_text_is_the_same_where_whole_blocks_are_accepted(agreeing, tmp_path):
    twin, (model, _) = agreeing(0.0, settled=True)
    source = make_agreeing_dflash(tmp_path / "dflash", twin, stray=0.0)
    (drafter,) = convert(Request(hf_path=str(source), mlx_path=tmp_path / "out"), QUIET)
    found = drafted(drafter, model)
    assert found["accepted"] > found["rounds"]


def test_the_judgement_sees_other_text(pair, monkeypatch):
    from validate import speculative

    model, drafter = pair
    greedy = speculative._greedy

    def garbled(runtime, ids, **drafting):
        tokens = greedy(runtime, ids, **drafting)
        return [*tokens[:-1], tokens[-1] + 1] if drafting else tokens

    monkeypatch.setattr(speculative, "_greedy", garbled)
    report = judge_drafter(drafter.folder, target=model.folder, plan=None)
    assert report.verdict == "fail"


def test_the_judgement_sees_a_changed_drafter(pair, tmp_path):
    """A drafter of torch's own names is shifted when it is loaded, and told by its weights."""
    model, drafter = pair
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in drafter.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    weights = {f"mtp.{name}": value for name, value in weights.items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "mlx"})
    (copy / "model.safetensors.index.json").unlink()
    report = judge_drafter(copy, target=model.folder, plan=None)
    assert [c.verdict for c in report.checks if c.name == "weights"] == ["fail"]


def test_a_quantized_drafter_still_writes_the_same_text(twin, tmp_path):
    recipe = Options(quant=QuantSpec.make("affine", 4, 64))
    request = Request(hf_path=str(twin), mlx_path=tmp_path / "q", recipes=(recipe,), mtp=True)
    model, drafter = convert(request, QUIET)
    assert drafter.plan.config["quantization"]["bits"] == 4
    assert "fc.scales" in {t.name for shard in drafter.plan.shards for t in shard.tensors}
    report = judge_drafter(drafter.folder, target=model.folder, plan=None)
    assert report.verdict == "pass"


def test_a_release_without_such_layers_is_refused(twin_of):
    with pytest.raises(
        PlanError, match="--mtp: the release has no further-token layers of 'qwen3_5'"
    ):
        plan_request(Request(hf_path=str(twin_of("qwen3_5")), mtp=True))


def test_a_type_without_a_drafter_is_refused(twin_of):
    with pytest.raises(PlanError, match=r"mlx-vlm has no drafter .* 'qwen3'"):
        plan_request(Request(hf_path=str(twin_of("qwen3")), mtp=True))


def test_the_command_writes_both(twin, tmp_path, capsys, monkeypatch):
    from converter.cli.app import cli

    monkeypatch.chdir(tmp_path)
    words = ["--hf-path", str(twin), "--mlx-path", "m", "--mtp", "--no-validate", "--quiet"]
    assert run(lambda: cli.main(words, standalone_mode=False)) == 0
    assert capsys.readouterr().out.split() == ["m", "m-mtp"]
    assert run(lambda: cli.main(["card", "m-mtp"], standalone_mode=False)) == 0
    assert "--draft-model" in (tmp_path / "m-mtp" / "README.md").read_text()


# Drafters that are releases of their own


@pytest.fixture(scope="module")
def dflash(tmp_path_factory):
    from validate.twin import load_example, make_twin

    folder = tmp_path_factory.mktemp("dflash") / "twin"
    make_twin(load_example("qwen3_dflash"), folder)
    (done,) = convert(Request(hf_path=str(folder), mlx_path=folder.with_name("out")), QUIET)
    return folder, done.folder


def test_a_dflash_drafter_of_qwen3_5_writes_the_same_text(dflash, pair):
    report = judge_drafter(dflash[1], target=pair[0].folder, plan=None)
    assert report.verdict == "pass"
    drafted = next(check for check in report.checks if check.name == "drafted")
    assert drafted.metrics["rounds"] > 0


def test_a_dflash_drafter_alone_is_not_proven(dflash):
    from converter.proof import prove

    source, out = dflash
    report = prove(out, source=source, console=QUIET)
    assert report["verdict"] == "unproven"
    assert any("--draft-for" in check["note"] for check in report["checks"])
    assert all(c["verdict"] == "pass" for c in report["checks"] if c["name"] == "weights")


def test_a_dflash_config_that_the_runtime_would_misread_is_refused(dflash, tmp_path):
    source, _ = dflash
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    config["use_sliding_window"] = True
    config["dflash_config"] = {"mask_token_id": 3, "target_layer_ids": []}
    folder = tmp_path / "twin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(PlanError, match="target_layer_ids must list layers"):
        plan_request(Request(hf_path=str(folder)))
