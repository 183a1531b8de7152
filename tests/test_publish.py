"""Publishing by hand: what a card keeps and names, and what is refused before hours of work."""

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
def published(api, tmp_path):
    """A hub release with a card of its own."""
    source = write_release(tmp_path / "source")
    (source / "README.md").write_text(f"---\n{FRONT}---\n# Tiny\n")
    api.create_repo("acme/tiny")
    api.upload_folder(repo_id="acme/tiny", folder_path=source)


@pytest.fixture
def out(published, tmp_path, monkeypatch):
    """A conversion of it, as `--no-validate` leaves it."""
    monkeypatch.chdir(tmp_path)
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


def test_a_card_of_an_earlier_version_is_not_taken_for_one_of_the_new_repo(api, out, capsys):
    """Its manifest does not tell which repo the card names."""
    passed(out)
    assert status("card", out, "--upload-repo", "local/tiny") == 0
    file, manifest = out / "README.md", out / "conversion.json"
    data = json.loads(manifest.read_text())
    assert data.pop("card_of") == "local/tiny"
    manifest.write_text(json.dumps(data))
    before = file.read_text()
    for _ in range(2):
        capsys.readouterr()
        assert status("upload", out, "--upload-repo", "local/b") == 0
        said = f"run convert card {out} --upload-repo local/b, and upload again"
        assert said in capsys.readouterr().err
        assert (file.read_text(), "card_of" in read_manifest(out).data) == (before, False)
    assert status("upload", out, "--upload-repo", "local/tiny") == 0
    assert "convert card" not in capsys.readouterr().err
    assert (file.read_text(), read_manifest(out).card_of) == (before, "local/tiny")
    assert status("upload", out, "--upload-repo", "local/b") == 0
    assert 'load("local/b")' in held(api, "local/b")
    assert (file.read_text(), read_manifest(out).card_of) == (held(api, "local/b"), "local/b")


def test_a_card_of_ones_own_that_names_no_repo_stays(api, out, capsys):
    passed(out)
    assert status("card", out, "--upload-repo", "local/a") == 0
    card = "---\nlicense: mit\n---\n# Mine\n"
    (out / "README.md").write_text(card)
    assert status("upload", out, "--upload-repo", "local/b") == 0
    assert held(api, "local/b") == card
    assert read_manifest(out).card_of == "local/a"  # what a card that comes back may name
    assert "convert card" not in capsys.readouterr().err


def test_an_output_does_not_replace_its_release(api, out, capsys):
    passed(out)
    before = api.model_info("acme/tiny").sha
    assert status("upload", out, "--upload-repo", "Acme/tiny") == 2
    assert "--upload-repo Acme/tiny: is the release itself" in capsys.readouterr().err
    assert api.model_info("acme/tiny").sha == before


def reader(api, monkeypatch):
    """Log in with a token that may not write."""
    access = {"accessToken": {"displayName": "staging", "role": "read"}}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.whoami", lambda self, **given: {"name": "local", "auth": access}
    )


def gated(api, monkeypatch):
    """Close the release to those who have not asked for it."""
    api.update_repo_settings("acme/tiny", gated="auto")


def public(api, monkeypatch):
    """Have a public repo of the name that would be derived."""
    api.create_repo("local/tiny-4bit")


def nobody(api, monkeypatch):
    """Log out."""
    monkeypatch.delenv("HF_TOKEN")


def unknown(api, monkeypatch):
    """Have a public repo of that name, on a hub that knows of no accounts."""
    public(api, monkeypatch)
    answering(monkeypatch, "", 404)


@pytest.mark.parametrize(
    ("before", "words", "code", "said"),
    [
        (None, ["--upload-repo", "tiny"], 2, "--upload-repo: tiny has no namespace"),
        (None, ["--upload-repo", "me/a b"], 2, "me/a b is no name that the hub takes"),
        (None, ["--upload-repo", "https://huggingface.co/me/x"], 2, "is no name that the hub"),
        (None, ["--upload-repo", "acme/tiny"], 2, "acme/tiny: is the release itself"),
        (None, ["--upload-repo", "me/x", "--variants", "8bit,4bit"], 2, "names one repo"),
        (None, ["--upload-repo", "--card-template", "bad.j2"], 2, "bad.j2, line 2: the card templ"),
        (nobody, ["--upload-repo"], 5, "No access token was found. Log in"),
        (reader, ["--upload-repo", "me/x"], 5, "the token of local may only read"),
        (gated, ["--upload-repo"], 4, "acme/tiny: is gated"),
        (public, ["--upload-repo", "--private"], 5, "local/tiny-4bit exists and is public"),
        (unknown, ["--upload-repo", "local/tiny-4bit", "--private"], 5, "exists and is public"),
        (unknown, ["--upload-repo"], 5, "does not tell which account the token belongs to"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:30],
)
def test_what_cannot_be_published_is_not_converted(
    api, published, tmp_path, monkeypatch, capsys, before, words, code, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.j2").write_text("# {{ title }}\n{% for %}\n")
    if before is not None:
        before(api, monkeypatch)
    quantized = [] if "--variants" in words else ["-q"]
    assert status("--hf-path", "acme/tiny", *quantized, "--quiet", *words) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*/model.safetensors.index.json"))


def test_a_name_that_gives_no_repo_is_said_at_once(api, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write_release(tmp_path / "Modell Nr 1")
    assert status("--hf-path", source, "-q", "--quiet", "--upload-repo") == 2
    assert "local/Modell Nr 1-4bit is no name that the hub takes" in capsys.readouterr().err


def test_what_has_no_proof_is_not_asked_to_be_published(api, out, tmp_path, capsys):
    assert status("--hf-path", out, "-d", "--quiet", "--upload-repo", "me/x") == 2
    assert "--upload-repo: what -d or --to torch makes" in capsys.readouterr().err


def test_a_hub_that_is_away_may_be_back_in_time(api, faults, monkeypatch):
    from converter.hub import require_private, writer
    from converter.staging import Fault

    assert writer(named=False) == "local"
    for failing in ("whoami-v2", "models/me/x"):
        faults.add(Fault("refuse", "GET", failing, status=503))
    assert writer(named=False) is None
    require_private("me/x")
    monkeypatch.delenv("HF_TOKEN")
    assert writer(named=True) is None  # a staging hub asks for no account


def answering(monkeypatch, answer, status=200):
    """Make the hub's answer to who is logged in one that mirrors give."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    text = answer if isinstance(answer, str) else json.dumps(answer)

    def whoami(self, **given):
        asked = httpx2.Request("GET", f"{self.endpoint}/api/whoami-v2")
        response = httpx2.Response(status, request=asked, text=text)
        hf_raise_for_status(response)
        return response.json()

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)


@pytest.mark.parametrize(
    ("answer", "code", "name"),
    [
        ({"name": "me", "auth": None}, 200, "me"),
        ({"name": "me", "auth": {"accessToken": "hidden"}}, 200, "me"),
        ({"auth": {"accessToken": {"role": "write"}}}, 200, None),
        ({"name": None}, 200, None),
        ([], 200, None),
        ("<html>Welcome</html>", 200, None),
        ("", 403, None),
        ("", 404, None),
    ],
)
def test_a_mirror_need_not_know_of_accounts(api, monkeypatch, answer, code, name):
    from converter.errors import HubError
    from converter.hub import whoami, writer

    answering(monkeypatch, answer, code)
    assert writer(named=True) == name
    for ask in (lambda: writer(named=False), whoami):
        if name is not None:
            assert ask() == name
            continue
        with pytest.raises(HubError) as caught:
            ask()
        said = f"{api.endpoint} does not tell which account the token belongs to. Name the repo"
        assert said in str(caught.value)


def test_what_is_certain_of_a_token_is_believed(api, monkeypatch):
    from converter.errors import HubError
    from converter.hub import writer

    answering(monkeypatch, {"auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(HubError, match="the token may only read"):
        writer(named=True)
    answering(monkeypatch, "", 401)
    with pytest.raises(HubError, match="did not accept the request's credentials"):
        writer(named=True)
