"""Reading the hub through the real client, against the staging hub and its faults."""

import hashlib
import os
from pathlib import Path

import pytest
from hub_helpers import HF_WEIGHTS, REPO, TOKEN, WEIGHTS
from huggingface_hub import HfApi, constants

from converter import hub
from converter.errors import HubError
from converter.hub import fetch
from converter.staging import Fault, Faults

# The client itself passes file objects to its HTTP library in a deprecated way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]


def test_resolve_revision(published: str) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert {f.path for f in snapshot.files} == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "sub/note.txt",
    }  # fmt: skip
    weights = snapshot.file("model.safetensors")
    assert weights.size == len(WEIGHTS)
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert snapshot.file("config.json").sha256 is None
    assert len(snapshot.commit) == 40
    assert (snapshot.license, snapshot.pipeline_tag) == ("apache-2.0", "text-generation")
    assert (snapshot.gated, snapshot.private, snapshot.library_name) == (False, False, "mlx")
    assert snapshot.card["tags"] == ["mlx"]
    assert snapshot.last_modified is not None
    assert hub.resolve_revision(REPO, revision=snapshot.commit, endpoint=published) == snapshot
    with pytest.raises(HubError, match=r"no file model\.safetensor; did you mean model\.safete"):
        snapshot.file("model.safetensor")


def test_fetch_range(published: str, faults: Faults) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert hub.fetch_range(snapshot, "model.safetensors", 8, 300) == WEIGHTS[8:300]
    end = len(WEIGHTS)
    assert hub.fetch_range(snapshot, "model.safetensors", end - 1, end) == WEIGHTS[-1:]
    assert hub.fetch_range(snapshot, "model.safetensors", 5, 5) == b""
    with pytest.raises(HubError, match="truncated or its header is wrong"):
        hub.fetch_range(snapshot, "model.safetensors", 0, end + 1)
    faults.add(Fault("ignore_range", "GET", HF_WEIGHTS))
    with pytest.raises(HubError, match="ignored a Range request"):
        hub.fetch_range(snapshot, "model.safetensors", 8, 300)


def test_fetch_range_tries_again(published: str, faults: Faults) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    faults.add(Fault("refuse", "GET", HF_WEIGHTS, times=2))
    faults.add(Fault("truncate", "GET", HF_WEIGHTS))
    assert hub.fetch_range(snapshot, "model.safetensors", 8, 90_000) == WEIGHTS[8:90_000]


def test_the_record_of_checked_files_is_only_that(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    cache = tmp_path / "cache"
    records = cache / ".verified"

    def download(*names: str) -> Path:
        return hub.download(snapshot, names, cache_dir=cache)

    cache.mkdir()
    records.write_text("in the way of the folder")
    root = download("config.json", "model.safetensors")
    records.unlink()
    with monkeypatch.context() as patch:  # it changes while it is hashed
        patch.setattr(fetch, "check_hash", lambda *given: os.utime(root / "config.json", (1, 1)))
        download("config.json")
    assert not list(records.iterdir())
    download("config.json", "model.safetensors")
    assert len(list(records.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "check_hash", pytest.fail)
        download("config.json", "model.safetensors")
    (root / "model.safetensors").resolve().unlink()
    (root / "model.safetensors").unlink()
    hashed = []
    original = fetch.check_hash
    with monkeypatch.context() as patch:  # the record of a file that was fetched anew is of old
        patch.setattr(
            fetch, "check_hash", lambda *given: hashed.append(given[1].path) or original(*given)
        )
        download("config.json", "model.safetensors")
    assert hashed == ["model.safetensors"]


def test_a_record_does_not_hang_on_others(published: str, tmp_path: Path) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    cache = tmp_path / "cache"
    hub.download(snapshot, ["config.json"], cache_dir=cache)
    (cache / ".verified" / "other").symlink_to("nowhere")  # as one that another thread removes
    hub.download(snapshot, ["model.safetensors"], cache_dir=cache)
    assert len(list((cache / ".verified").iterdir())) == 3


def test_download_is_pinned_and_reports_progress(
    published: str, folder: Path, tmp_path: Path
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    (folder / "config.json").write_text('{"moved": true}')
    hub.upload(folder, REPO, commit_message="second", endpoint=published)
    seen: list[tuple[int, int]] = []
    got = hub.download(
        snapshot,
        ["model.safetensors", "config.json", "sub/note.txt"],
        progress=lambda done, total: seen.append((done, total)),
        cache_dir=tmp_path / "cache",
    )
    assert got.name == snapshot.commit
    assert (got / "model.safetensors").read_bytes() == WEIGHTS
    assert (got / "config.json").read_text() == "{}"
    assert (got / "sub" / "note.txt").read_text() == "note"
    total = len(WEIGHTS) + 2 + 4
    assert seen[-1] == (total, total)
    assert not (got / "README.md").exists()


@pytest.mark.parametrize("path", ["model.safetensors", "sub/note.txt"])
def test_damage_of_the_same_size_is_caught_and_repaired(
    published: str, faults: Faults, tmp_path: Path, path: str
) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    faults.add(Fault("corrupt", "GET", f"resolve/.*/{path}"))
    cache = tmp_path / "cache"
    with pytest.raises(HubError, match=f"{path} of acme/model arrived damaged.*run the same"):
        hub.download(snapshot, [path], cache_dir=cache)
    assert not [p for p in cache.rglob("*") if p.is_file() and p.parent.name == "blobs"]
    got = hub.download(snapshot, [path], cache_dir=cache)
    assert hub.sha256_of(got / path) == hub.sha256_of(tmp_path / "model" / path)


def test_damage_in_the_cache_is_caught(published: str, tmp_path: Path) -> None:
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    got = hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")
    (got / "model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(HubError, match="arrived damaged"):
        hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")
    hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "cache")


def test_errors_say_what_to_do(
    published: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(**arguments: str) -> str:
        with pytest.raises(HubError) as caught:
            hub.resolve_revision(**{"repo_id": REPO, "endpoint": published, **arguments})
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)
        return str(caught.value)

    assert "no repository acme/nope, or your token does not see it" in look(repo_id="acme/nope")
    assert "acme/model has no such revision" in look(revision="nope")
    assert "is not a repository name" in look(repo_id="not a name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "log in with `hf auth login` or set HF_TOKEN" in look(repo_id="acme/nope")
    with pytest.raises(HubError, match=r"No access token was found\. Log in with"):
        hub.whoami(endpoint=published)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.whoami(endpoint=published) == "local"
    retry = (("retry-after", "7"),)
    faults.add(Fault("refuse", "GET", "/api/models", status=429, times=4, headers=retry))
    assert "Wait 7 seconds and run the same command again" in look()
    faults.add(Fault("refuse", "GET", "/api/models", status=502, times=4))
    assert "the hub is failing (HTTP 502)" in look()
    faults.add(Fault("refuse", "GET", "/api/models", status=503, times=2))
    assert hub.resolve_revision(REPO, endpoint=published).repo_id == REPO
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in look()


def test_an_unreachable_hub_is_said_plainly() -> None:
    with pytest.raises(HubError, match=r"cannot be reached \(ConnectError\)\. Check the conn"):
        hub.resolve_revision(REPO, endpoint="http://127.0.0.1:9")


def test_gated_and_forbidden(published: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=published, token=TOKEN)
    api.update_repo_settings(REPO, gated="manual")
    snapshot = hub.resolve_revision(REPO, endpoint=published)
    assert snapshot.gated
    for call in (
        lambda: hub.download(snapshot, ["model.safetensors"], cache_dir=tmp_path / "c"),
        lambda: hub.fetch_range(snapshot, "model.safetensors", 0, 8),
    ):
        with pytest.raises(HubError, match=f"is gated. Ask for access at {published}/{REPO};"):
            call()


def test_a_hostile_hub_cannot_name_a_file_outside(
    published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = HfApi.model_info

    def hostile(self: HfApi, *args: object, **kwargs: object) -> object:
        info = original(self, *args, **kwargs)
        info.siblings[0].rfilename = "a/../../x"
        return info

    monkeypatch.setattr(HfApi, "model_info", hostile)
    with pytest.raises(HubError, match="would leave its folder"):
        hub.resolve_revision(REPO, endpoint=published)
