"""Several outputs of one command: what is proven is published, whatever becomes of the others."""

import pytest
from release_helpers import status, write_release

from converter.cli import proving
from converter.errors import ConvertError, GateError, HubError


@pytest.fixture
def uploads(monkeypatch):
    """The repos that were uploaded to; proofs and uploads only pretend."""
    done = []
    monkeypatch.setattr("converter.proof.require_proof", lambda out, **given: {})
    monkeypatch.setattr("converter.publish.write_card", lambda out, **given: None)
    monkeypatch.setattr("converter.hub.whoami", lambda: "me")
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
    ],
    ids=str,
)
def test_an_output_that_fails_leaves_the_others(
    uploads, tmp_path, monkeypatch, capsys, failures, code
):
    def prove(out, **given):
        failure = failures.get(out.name.rpartition("-")[2], "pass")
        if isinstance(failure, ConvertError):
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
