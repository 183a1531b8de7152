"""Renewals of finished outputs that were killed, that are under way, and that nobody left."""

import hashlib
import json
import os

import pytest
from release_helpers import hashes, status, write_release

from converter import renewal
from converter.errors import ConvertError
from converter.execute.folder import BusyError
from converter.manifest import renewed, verify
from converter.renewal import complete, renew
from converter.scratch import held

SETTINGS = {"kv_cache.json": b"1", "config.json": b'{"a": 1}'}


@pytest.fixture
def out(tmp_path):
    """A finished output without settings."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    entry = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    manifest = {"format": 1, "plan": "p", "files": {"config.json": entry}}
    (folder / "conversion.json").write_text(json.dumps(manifest))
    return folder


def left(out, *steps, content="evil"):
    """Have ``out`` come with a renewal that is to be completed."""
    (out / ".renewal").mkdir()
    for number, _ in enumerate(steps):
        (out / ".renewal" / str(number)).write_text(content)
    (out / ".renewal" / "order.json").write_text(json.dumps(steps))


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("name", ["../precious", "/precious", "model_kv_cache/../../precious", "x"])
def test_names_that_no_study_writes_are_refused(out, name, gone):
    precious = out.parent / "precious"
    precious.write_text("old")
    name = str(precious) if name == "/precious" else name
    left(out, ["config.json", True], [name, gone])
    with pytest.raises(ConvertError, match=r"order\.json: names .*, which no KV study writes"):
        complete(out)
    assert precious.read_text() == "old"
    assert (out / "config.json").is_file(), "nothing is done of what is refused"


@pytest.mark.parametrize("at", [".renewal", "model_kv_cache", ".renewal/order.json", ".renewal/0"])
def test_links_are_refused(out, at):
    away = out.parent / "away"
    left(out, ["model_kv_cache/bases.safetensors", False])
    link = out / at
    if link.exists():
        link.rename(away)
    else:
        away.mkdir()
    link.symlink_to(away)
    with pytest.raises(ConvertError, match=rf"{at}: is a link, which no KV study leaves"):
        complete(out)
    assert not (out / "model_kv_cache" / "bases.safetensors").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[["config.json"]]', '[["config.json", 0]]'])
def test_a_damaged_order_is_refused(out, text):
    left(out)
    (out / ".renewal" / "order.json").write_text(text)
    with pytest.raises(ConvertError, match=r"order\.json: is damaged; remove the folder \.renewal"):
        complete(out)


def test_a_live_renewal_is_left_alone(out, monkeypatch):
    """A lock belongs to an open file, so that the same process is as good as another."""
    write, refused = renewal.write_atomic, []

    def meanwhile(path, content):
        with pytest.raises(BusyError, match="another process is working") as found:
            complete(out)
        refused.append(found)
        write(path, content)

    monkeypatch.setattr(renewal, "write_atomic", meanwhile)
    renew(out, {**SETTINGS, "conversion.json": renewed(out, SETTINGS)})
    assert len(refused) == 4
    assert verify(out)[0] == 2
    assert not list(out.glob(".renewal*"))


def test_verifying_tells_how_to_finish_a_killed_renewal(out, monkeypatch):
    replace = os.replace

    def killed(source, target):
        if os.path.basename(target) == "conversion.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(renewal.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            renew(out, {**SETTINGS, "conversion.json": renewed(out, SETTINGS)})
    with pytest.raises(ConvertError, match=rf"was interrupted; `convert kv {out}` writes the rest"):
        verify(out)
    complete(out)
    assert verify(out)[0] == 2
    (out / "kv_cache.json").write_text("2")
    with pytest.raises(ConvertError, match="its content has changed") as found:
        verify(out)
    assert "interrupted" not in str(found.value)


def test_a_conversion_leaves_an_output_whose_settings_are_being_written(tmp_path, capsys):
    source, out = write_release(tmp_path / "model"), tmp_path / "out"
    told = ["--hf-path", source, "--mlx-path", out, "--quiet", "--no-validate"]
    assert status(*told) == 0
    before = hashes(out)
    capsys.readouterr()
    with held(out / ".renewal.partial"):
        assert status(*told) == 2
        assert (out / ".renewal.partial").is_dir()
    assert "another process is working on the same conversion" in capsys.readouterr().err
    (out / ".renewal.partial").rmdir()
    assert hashes(out) == before
