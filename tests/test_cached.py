"""Releases in the cache of the hub's client: known for what they are, with and without the hub."""

import shutil
from pathlib import Path

import pytest
from release_helpers import FOUR_BIT, hashes, make, status, write_release

from converter.manifest import read_manifest
from converter.release import open_release

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def cache(api, tmp_path, monkeypatch):
    """A cache that holds the whole of acme/tiny."""
    source = write_release(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    api.create_repo("acme/tiny")
    api.upload_folder(repo_id="acme/tiny", folder_path=source)
    root = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    api.snapshot_download("acme/tiny", cache_dir=root)
    return root


def offline(monkeypatch):
    """Keep the client from asking the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def snapshot(cache: Path) -> Path:
    """The one snapshot in the cache."""
    (folder,) = (cache / "models--acme--tiny" / "snapshots").iterdir()
    return folder


def test_a_snapshot_and_an_id_give_the_same(cache, tmp_path, monkeypatch):
    by_id, by_folder, away = (tmp_path / name for name in ("id", "folder", "away"))
    make("acme/tiny", by_id, FOUR_BIT)
    make(snapshot(cache), by_folder, FOUR_BIT)
    offline(monkeypatch)
    make("acme/tiny", away, FOUR_BIT)
    assert hashes(by_id) == hashes(by_folder) == hashes(away)
    told = read_manifest(by_id).data["source"]
    assert (told["repo"], told["commit"]) == ("acme/tiny", snapshot(cache).name)


def test_the_name_is_that_of_the_repo(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    for given in (snapshot(cache), "acme/tiny"):
        told = ["--quiet", "--no-validate", "-q", "--q-group-size", "32", "--overwrite"]
        assert status("--hf-path", given, *told) == 0
        assert capsys.readouterr().out == "tiny-4bit\n"


def test_what_the_cache_does_not_hold_is_said(cache, monkeypatch, capsys):
    offline(monkeypatch)
    assert status("plan", "--hf-path", "acme/tiny", "--revision", "main") == 0
    capsys.readouterr()
    for asked in (["acme/other"], ["acme/tiny", "--revision", "v2"]):
        assert status("plan", "--hf-path", *asked) == 5
        said = capsys.readouterr().err
        assert f"HF_HUB_OFFLINE is set, and {cache} holds no {' at '.join(asked[::2])}." in said


def test_a_damaged_blob_is_not_converted(cache, tmp_path, monkeypatch, capsys):
    offline(monkeypatch)
    weights = (snapshot(cache) / "model.safetensors").resolve()
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    told = ["--mlx-path", tmp_path / "out", "--quiet", "--no-validate"]
    assert status("--hf-path", snapshot(cache), *told) == 5
    assert "model.safetensors of acme/tiny arrived damaged" in capsys.readouterr().err
    assert not weights.exists()


def test_a_snapshot_that_somebody_changed_is_a_folder_like_others(cache):
    folder = snapshot(cache)
    assert open_release(str(folder)).origin["repo"] == "acme/tiny"
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(config)
    changed = open_release(str(folder))
    assert (changed.name, changed.origin) == ("tiny", {})


def test_only_a_cache_is_taken_for_one(cache, tmp_path):
    copy = tmp_path / "models--acme--tiny" / "main"
    shutil.copytree(snapshot(cache), copy)
    assert (open_release(str(copy)).name, open_release(str(copy)).origin) == ("main", {})
