"""Several outputs of one command: what is proven is published, whatever becomes of the others."""

import json
from types import SimpleNamespace

import pytest
from release_helpers import hashes, make, status, write_release

from converter.cli import proving
from converter.errors import ConvertError, GateError, HubError, PlanError
from converter.manifest import file_sha256, read_manifest, refresh
from converter.proof import standing_report


@pytest.fixture
def uploads(monkeypatch):
    """The repos that were uploaded to; proofs and uploads only pretend."""
    done = []
    # Before the other, so that its module has not the pretended one for good.
    monkeypatch.setattr("converter.publish.write_card", lambda out, **given: None)
    monkeypatch.setattr("converter.proof.require_proof", lambda out, **given: {})
    monkeypatch.setattr("converter.hub.writer", lambda named: "me")
    monkeypatch.setattr("converter.hub.require_private", lambda repo: None)
    monkeypatch.setattr(proving, "verdict_text", lambda report, out: "")
    monkeypatch.setattr(proving, "_set_side_by_side", lambda outputs: None)
    monkeypatch.setattr(
        "converter.publish.upload_output", lambda out, repo, **given: done.append(repo) or "there"
    )
    return done


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({"4bit": ConvertError("cannot be run as the reference")}, 1),
        ({"4bit": "fail"}, 4),
        ({"4bit": "fail", "8bit": ConvertError("cannot be run as the reference")}, 1),
        ({"8bit": HubError("the network is away")}, 5),
        ({"4bit": "fail", "8bit": HubError("the network is away")}, 4),
        ({"bf16": PlanError(["a", "b"]), "8bit": HubError("the network is away")}, 5),
        ({"bf16": RuntimeError("a fault"), "8bit": "fail"}, 1),
    ],
    ids=str,
)
def test_an_output_that_fails_leaves_the_others(
    uploads, tmp_path, monkeypatch, capsys, failures, code
):
    def prove(out, **given):
        failure = failures.get(out.name.rpartition("-")[2], "pass")
        if isinstance(failure, Exception):
            raise failure
        return {"verdict": failure, "checks": [{"name": "logits", "verdict": failure}]}

    monkeypatch.setattr("converter.proof.prove", prove)
    source, out = write_release(tmp_path / "model"), tmp_path / "out"
    asked = ["--variants", "bf16,4bit,8bit", "--upload-repo"]
    assert status("--hf-path", source, "--mlx-path", out, "--quiet", *asked) == code
    kept = [name for name in ("bf16", "4bit", "8bit") if name not in failures]
    assert uploads == [f"me/model-{name}" for name in kept]
    said = capsys.readouterr().err
    assert all(f"{out / f'model-{name}'}: " in said for name in failures)


def test_a_single_output_fails_as_it_does(uploads, tmp_path, monkeypatch, capsys):
    def prove(out, **given):
        raise GateError("not good enough")

    monkeypatch.setattr("converter.proof.prove", prove)
    source = write_release(tmp_path / "model")
    out = tmp_path / "out"
    assert status("--hf-path", source, "--mlx-path", out, "--quiet", "--upload-repo") == 4
    assert capsys.readouterr().err == "not good enough\n"
    assert uploads == []


def test_what_failed_is_said_though_the_run_is_interrupted(uploads, tmp_path, monkeypatch, capsys):
    def prove(out, **given):
        raise KeyboardInterrupt if out.name.endswith("4bit") else ConvertError("cannot be run")

    monkeypatch.setattr("converter.proof.prove", prove)
    source, out = write_release(tmp_path / "model"), tmp_path / "out"
    told = ["--hf-path", source, "--mlx-path", out, "--quiet", "--variants", "bf16,4bit"]
    assert status(*told) == 130
    assert f"{out / 'model-bf16'}: cannot be run" in capsys.readouterr().err


def passing(out, **changed):
    """Write the report of a passed proof of exactly this output."""
    manifest = read_manifest(out)
    report = {"plan": manifest.plan, "checkpoint": manifest.checkpoint, "verdict": "pass"}
    report |= {"checks": [{"name": "loss", "threshold": None, "verdict": "info"}]} | changed
    (out / "parity.json").write_text(json.dumps(report))
    return report


def test_the_same_command_goes_on_where_it_stopped(uploads, tmp_path, monkeypatch, capsys):
    proofs, away, there = [], ["me/model-8bit"], {}

    def prove(out, **given):
        proofs.append(out.name)
        return passing(out)

    def upload(out, repo, **given):
        if repo in away:
            raise HubError("the network is away")
        uploads.append(repo)
        there[repo] = read_manifest(out).checkpoint

    def find(repo, plan, folder):
        facts = {"checkpoint": there.get(repo)}
        return SimpleNamespace(url=f"there/{repo}", facts=facts) if repo in there else None

    monkeypatch.setattr("converter.proof.prove", prove)
    monkeypatch.setattr("converter.proof.draw_page", lambda out: None)
    monkeypatch.setattr("converter.publish.upload_output", upload)
    monkeypatch.setattr("converter.batch.published.find_published", find)
    source, out = write_release(tmp_path / "model"), tmp_path / "out"
    (source / "chat_template.jinja").write_text("hello")
    told = ["--hf-path", source, "--mlx-path", out, "--quiet", "--variants", "bf16,4bit,8bit"]
    told.append("--upload-repo")
    assert status(*told) == 5
    assert (len(proofs), uploads) == (3, ["me/model-bf16", "me/model-4bit"])
    away.clear()
    assert status(*told) == 0
    assert (len(proofs), uploads[2:]) == (3, ["me/model-8bit"])
    capsys.readouterr()
    assert status(*told) == 2
    said = capsys.readouterr().err
    assert "model-8bit: is published already, at there/me/model-8bit" in said
    assert "--overwrite" in said
    there["me/model-8bit"] = "another checkpoint of the same plan"
    assert status(*told) == 0
    assert (len(proofs), uploads[3:]) == (3, ["me/model-8bit"])
    assert status(*told[:-1]) == 2  # all are judged, and nothing is left to be done
    assert "holds a finished conversion; use --overwrite" in capsys.readouterr().err
    (out / "model-4bit" / "parity.json").unlink()  # as if it had been killed in that proof
    assert status(*told[:-1]) == 0
    assert proofs[3:] == ["model-4bit"]
    (source / "chat_template.jinja").write_text("hello, hello")
    capsys.readouterr()
    assert status(*told) == 2
    assert "holds a finished conversion; use --overwrite" in capsys.readouterr().err
    (source / "chat_template.jinja").write_text("hello")
    config = out / "model-4bit" / "config.json"
    plain = config.read_text()
    config.write_text(json.dumps({**json.loads(plain), "kv_cache_quantization": {}}))
    refresh(config.parent, {"config.json": file_sha256(config)})
    assert status(*told) == 2  # KV settings that this command does not ask for
    assert "holds a finished conversion; use --overwrite" in capsys.readouterr().err
    config.write_text(plain)
    refresh(config.parent, {"config.json": file_sha256(config)})
    config.write_text(plain + " ")  # what is damaged is neither proven nor published
    assert status(*told) == 2
    assert (len(proofs), len(uploads)) == (4, 4)


def test_cards_and_repos_are_made_anew_from_a_standing_conversion(
    uploads, tmp_path, monkeypatch, capsys
):
    """What is about publishing alone neither converts nor proves again."""
    proofs, cards = [], []

    def prove(out, **given):
        proofs.append(out)
        return passing(out)

    monkeypatch.setattr("converter.proof.prove", prove)
    monkeypatch.setattr("converter.proof.draw_page", lambda out: None)
    monkeypatch.setattr(
        "converter.publish.write_card", lambda out, **given: cards.append(given["template"])
    )
    monkeypatch.setattr(
        "converter.batch.published.find_published",
        lambda repo, plan, folder: (
            SimpleNamespace(
                url="there", facts={"checkpoint": read_manifest(tmp_path / "out").checkpoint}
            )
            if repo in uploads
            else None
        ),
    )
    source, out = write_release(tmp_path / "model"), tmp_path / "out"
    template = tmp_path / "card.j2"
    template.write_text("card")
    told = ["--hf-path", source, "--mlx-path", out, "--quiet", "-q", "--q-group-size", "32"]
    assert status(*told, "--upload-repo", "me/one") == 0
    before = hashes(out)
    monkeypatch.setattr("converter.pipeline.execute", None)
    assert status(*told, "--upload-repo", "me/one") == 2
    assert "is published already, at there" in capsys.readouterr().err
    assert status(*told, "--upload-repo", "me/two") == 0
    assert status(*told, "--upload-repo", "me/two", "--private") == 0
    assert status(*told, "--upload-repo", "me/two", "--card-template", template) == 0
    assert uploads == ["me/one", "me/two", "me/two", "me/two"]
    assert status(*told, "--card-template", template) == 0
    assert cards == [None, None, None, template, template]
    assert (len(proofs), hashes(out)) == (1, before)
    capsys.readouterr()
    for idle in (["--private"], ["--card-template", template, "--no-validate"]):
        assert status(*told, *idle) == 2, "there is nothing left to do"
        assert "holds a finished conversion; use --overwrite" in capsys.readouterr().err
    assert (cards[5:], hashes(out)) == ([], before)


def test_a_report_stands_for_its_own_files_and_gates_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.proof.draw_page", lambda out: None)
    [out] = make(write_release(tmp_path / "model"), tmp_path / "out")
    assert standing_report(out, kl_threshold=None) is None
    report = passing(out)
    assert standing_report(out, kl_threshold=None) == report
    assert standing_report(out, kl_threshold=0.1) is None
    for changed in (
        {"verdict": "fail"},
        {"verdict": "unproven"},
        {"plan": "another"},
        {"checkpoint": "of other files"},
        {"checks": [{"name": "loss", "threshold": 5.0, "verdict": "pass"}]},
        {"kv_cache": {"chosen": "uniform"}},
    ):
        passing(out, **changed)
        assert standing_report(out, kl_threshold=None) is None, changed
    (out / "parity.json").write_text("{")
    assert standing_report(out, kl_threshold=None) is None
