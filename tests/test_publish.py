"""The last two steps by hand: a card that keeps what the release's says, and goes where it goes."""

import json

import pytest
from release_helpers import status, write_release

from converter.manifest import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FRONT = """\
license: other
license_name: tiny
license_link: https://example.org/tiny
pipeline_tag: text-generation
language: [en, no]
datasets: [acme/text]
tags: [chat, pytorch]
widget: [{text: hello}]
"""


@pytest.fixture
def out(api, tmp_path, monkeypatch):
    """A conversion of a hub release with a card of its own, as `--no-validate` leaves it."""
    monkeypatch.chdir(tmp_path)
    source = write_release(tmp_path / "source")
    (source / "README.md").write_text(f"---\n{FRONT}---\n# Tiny\n")
    api.create_repo("acme/tiny")
    api.upload_folder(repo_id="acme/tiny", folder_path=source)
    out = tmp_path / "tiny-4bit"
    told = ["--hf-path", "acme/tiny", "-q", "--mlx-path", out, "--quiet", "--no-validate"]
    assert status(*told) == 0
    return out


def passed(out):
    """The report of a proof that this output has passed."""
    manifest = read_manifest(out)
    report = {"plan": manifest.plan, "checkpoint": manifest.checkpoint, "verdict": "pass"}
    report |= {"checks": [], "reference": {}, "runtime": {}}
    (out / "parity.json").write_text(json.dumps(report))


def held(api, repo):
    """The card that a repo holds."""
    with open(api.hf_hub_download(repo, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_a_card_written_later_repeats_what_the_release_states(out):
    assert status("card", out) == 0
    card = (out / "README.md").read_text()
    stated = "license: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny\n"
    stated += "language:\n- en\n- 'no'\ndatasets:\n- acme/text\ntags:\n- mlx\n- chat\n"
    assert stated in card
    assert "widget" not in json.dumps(read_manifest(out).data)


def test_the_card_names_the_repo_it_goes_to(api, out):
    passed(out)
    assert status("card", out) == 0
    file = out / "README.md"
    assert "path/to/this/folder" in file.read_text()
    file.write_text(file.read_text() + "\nWritten by hand about acme/tiny.\n")
    for repo in ("local/tiny-4bit", "local/tiny-4bit-x", "local/tiny-4bit"):
        assert status("upload", out, "--upload-repo", repo) == 0
        card = held(api, repo)
        assert card == file.read_text()
        assert f"# {repo.split('/')[1]}\n" in card
        assert f"mlx_lm.server --model {repo} --port 8080" in card
        assert f'load("{repo}")' in card
        assert "path/to/this/folder" not in card
        assert ("tiny-4bit-x" in card) == repo.endswith("x")
        assert "Written by hand about acme/tiny." in card
        assert "MLX checkpoint of [acme/tiny]" in card


def test_an_output_does_not_replace_its_release(api, out, capsys):
    passed(out)
    before = api.model_info("acme/tiny").sha
    assert status("upload", out, "--upload-repo", "Acme/tiny") == 2
    assert "--upload-repo Acme/tiny: is the release itself" in capsys.readouterr().err
    assert api.model_info("acme/tiny").sha == before
