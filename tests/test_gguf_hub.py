"""GGUF files on the hub: what is fetched to plan, and heads that arrive damaged."""

from types import SimpleNamespace

import pytest
from gguf_files import (
    U32,
    File,
    entry,
    llama3_factors,
    llama3_file,
)

from converter.errors import HubError, PlanError
from converter.release import open_release
from converter.source import open_folder


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """Stages m-Q4_0.gguf and files of other names and sizes; the ranges that are fetched of it."""
    from converter import hub
    from converter.source import gguf

    path = File().write(tmp_path / "m-Q4_0.gguf")
    ranges = []

    def fetch_range(where, name, start, stop):
        ranges.append((start, stop))
        return path.read_bytes()[start:stop]

    def stage(**sizes):
        sizes = {path.name: path.stat().st_size, **sizes}
        files = {name: SimpleNamespace(path=name, size=size) for name, size in sizes.items()}
        snapshot = SimpleNamespace(
            repo_id="someone/m-GGUF",
            commit="0" * 40,
            gated=False,
            files=tuple(files.values()),
            by_path=files,
        )
        monkeypatch.setattr(hub, "resolve_revision", lambda repo, revision=None: snapshot)
        return ranges

    monkeypatch.setattr(gguf, "_FIRST_READ", 100)
    monkeypatch.setattr(hub, "fetch_range", fetch_range)
    monkeypatch.setattr(hub, "download", lambda snapshot, wanted, **given: tmp_path)
    return stage


def test_on_the_hub_only_the_head_is_fetched_to_plan(tmp_path, staged):
    from converter.release import fetch

    ranges = staged()
    release = open_release("someone/m-GGUF")
    assert ranges == [(0, 100), (100, 400), (400, 1600)]
    assert (release.name, release.root) == ("m", None)
    local = fetch(release)
    assert local.root == tmp_path / "m-Q4_0.gguf"
    assert local.source.tensors == open_folder(local.root).tensors
    assert {**local.origin} == {"repo": "someone/m-GGUF", "commit": "0" * 40}


def test_on_the_hub_a_head_that_arrived_damaged_is_found_out(tmp_path, staged, monkeypatch):
    """A setting changed on the way to the plan; the file came whole, and its hash was right."""
    from converter import hub
    from converter.release import fetch

    staged()
    sound = hub.fetch_range
    wrong = [entry("llama.context_length", U32, size) for size in (128, 129)]

    def damaged(*given):
        return sound(*given).replace(*wrong)

    monkeypatch.setattr("converter.source.gguf._FIRST_READ", 4000)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "fetch_range", damaged)
        release = open_release("someone/m-GGUF")
    assert release.source.config["max_position_embeddings"] == 129
    with pytest.raises(HubError, match=r"m-Q4_0\.gguf of someone/m-GGUF: its header arrived dam"):
        fetch(release)


def test_on_the_hub_rotary_factors_that_arrived_damaged_are_found_out(tmp_path, staged):
    """They make settings, and lie behind the head."""
    from converter.release import fetch

    path = llama3_file(8.0).write(tmp_path / "m-Q4_0.gguf")
    sound = path.read_bytes()
    staged()
    path.write_bytes(sound.replace(llama3_factors(8.0), llama3_factors(32.0)))
    release = open_release("someone/m-GGUF")
    assert release.source.config["rope_scaling"]["factor"] == 32
    path.write_bytes(sound)
    with pytest.raises(HubError, match=r"m-Q4_0\.gguf of someone/m-GGUF: its header arrived dam"):
        fetch(release)
    assert fetch(open_release("someone/m-GGUF")).source.config["rope_scaling"]["factor"] == 8


def test_on_the_hub_weights_are_chosen_as_in_a_folder(tmp_path, staged):
    staged(**{"optimizer.bin": 9})
    [note] = [n for n in open_release("someone/m-GGUF").source.notes if "optimizer" in n]
    assert note == "optimizer.bin is ignored: training state"
    staged(**{"model.safetensors": 9})
    with pytest.raises(PlanError, match=r"has no config.json; .* name its GGUF file with --gguf-f"):
        open_release("someone/m-GGUF")
    release = open_release("someone/m-GGUF", gguf="m-Q4_0.gguf")
    assert release.source.weight_files == ("m-Q4_0.gguf",)


def test_on_the_hub_a_config_beside_the_file_is_bounded(staged):
    staged(**{"config.json": 1 << 30})
    with pytest.raises(PlanError, match=r"config.json: has 1073741824 bytes, too large for what"):
        open_release("someone/m-GGUF")
