"""Releases in the cache of the hub's client: known for what they are, with and without the hub."""

import errno
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub._tree_cache import _IN_MEMORY_TREE_CACHE
from release_helpers import FOUR_BIT, hashes, make, status, write_release

from converter.errors import HubError, UsageError
from converter.hub import download, resolve_revision
from converter.manifest import read_manifest
from converter.release import open_release

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def cache(api, tmp_path, monkeypatch):
    """A cache that holds the whole of acme/tiny."""
    source = write_release(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "picture.gguf").write_bytes(b"weights that no conversion reads")
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


def test_a_gate_is_known_to_the_hub_alone(api, cache, tmp_path):
    api.update_repo_settings("acme/tiny", gated="auto")
    by_id, by_folder = tmp_path / "id", tmp_path / "folder"
    make("acme/tiny", by_id, FOUR_BIT)
    make(snapshot(cache), by_folder, FOUR_BIT)
    told, silent = read_manifest(by_id), read_manifest(by_folder)
    assert told.data["source"] == {**silent.data["source"], "gated": True}
    assert (told.files, told.source_card) == (silent.files, silent.source_card)
    assert told.plan != silent.plan


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


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja", "README.md"])
def test_a_blob_that_differs_is_neither_converted_nor_removed(
    cache, tmp_path, monkeypatch, capsys, name, by_id
):
    if by_id:
        offline(monkeypatch)
    edited = snapshot(cache) / name
    with edited.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    before = edited.read_bytes()
    told = ["--mlx-path", tmp_path / "out", "--quiet", "--no-validate"]
    for _ in range(2):
        assert status("--hf-path", "acme/tiny" if by_id else snapshot(cache), *told) == 3
        said = capsys.readouterr().err
        assert f"{name}: is not what the cache calls it" in said
        assert "copy the folder" in said
        assert edited.is_symlink()
        assert edited.read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_a_download_that_differs_stays_where_it_cannot_be_fetched_anew(cache, monkeypatch):
    held = resolve_revision("acme/tiny")
    edited = snapshot(cache) / "chat_template.jinja"
    edited.write_text("{{ my own }}")
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(HubError, match=r"arrived damaged.* Unset HF_HUB_OFFLINE"):
            download(held, ["chat_template.jinja"])
    with monkeypatch.context() as patch:
        refusal = PermissionError(errno.EACCES, "Permission denied")
        patch.setattr(Path, "unlink", Mock(side_effect=refusal))
        with pytest.raises(HubError, match=r"cannot be removed from the cache \(Permission denied"):
            download(held, ["chat_template.jinja"])
    assert edited.read_text() == "{{ my own }}"
    with pytest.raises(HubError, match="has been removed from the cache"):
        download(held, ["chat_template.jinja"])
    assert not edited.is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model.safetensors"])
def test_a_part_of_a_release_does_not_go_by_its_commit(cache, tmp_path, monkeypatch, capsys, name):
    (snapshot(cache) / name).unlink()
    offline(monkeypatch)
    assert status("plan", "--hf-path", "acme/tiny") == 5
    said = capsys.readouterr().err
    assert f"the cache holds acme/tiny at {snapshot(cache).name} without {name}." in said
    if name == "model.safetensors":
        return
    make(snapshot(cache), tmp_path / "out", FOUR_BIT)
    made = read_manifest(tmp_path / "out")
    assert "repo" not in made.data["source"]
    assert "commit" not in made.data["source"]
    assert any(note.endswith(f": the cache lacks {name}") for note in made.data["notes"])


def test_what_no_conversion_reads_may_be_missing(cache, tmp_path, monkeypatch):
    make("acme/tiny", tmp_path / "whole", FOUR_BIT)
    (snapshot(cache) / "picture.gguf").unlink()
    offline(monkeypatch)
    for given in ("acme/tiny", snapshot(cache)):
        make(given, tmp_path / "part", FOUR_BIT)
        assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")


def test_a_cache_without_a_listing_is_a_folder_like_others(cache):
    (cache / "models--acme--tiny" / "trees" / f"{snapshot(cache).name}.json").rename(cache / "x")
    _IN_MEMORY_TREE_CACHE.clear()
    release = open_release(str(snapshot(cache)))
    assert (release.name, release.origin) == ("tiny", {})
    assert "no listing" in release.source.notes[-1]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_an_output_that_lacks_a_file_of_the_release_is_not_taken_for_it(cache, tmp_path, name):
    out = tmp_path / "out"
    make("acme/tiny", out, FOUR_BIT)
    make("acme/tiny", out, FOUR_BIT)  # which finds it finished
    manifest = json.loads((out / "conversion.json").read_text())
    del manifest["files"][name]
    (out / "conversion.json").write_text(json.dumps(manifest))
    (out / name).unlink()
    with pytest.raises(UsageError, match="holds a finished conversion; use --overwrite"):
        make("acme/tiny", out, FOUR_BIT)


@pytest.mark.parametrize("given", ["models/my--model", "models/foo.git"])
def test_a_name_that_no_repo_can_have_is_said_offline(monkeypatch, capsys, given):
    offline(monkeypatch)
    assert status("plan", "--hf-path", given) == 5
    assert f"'{given}' is not a repository name" in capsys.readouterr().err


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
