"""The reader of streams: windows read once, in turns, hashed in order, and given up together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from release_helpers import llama_tensors
from stream_helpers import (
    CONFIG,
    REPO,
    WINDOW,
    hub_source,
    publish,
    write_shards,
)

from converter import hub
from converter.errors import HubError
from converter.hub import snapshot as hub_snapshot
from converter.hub import stream
from converter.hub.stream import StreamReader

pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.fixture
def release(tmp_path, api):
    folder = write_shards(tmp_path / "in" / "model", CONFIG, llama_tensors(CONFIG))
    publish(folder)
    return folder


def test_bytes_that_differ_when_read_again_are_damage(release):
    """What was handed out is what was hashed, even where it had to be read twice."""
    snapshot = hub.resolve_revision(REPO)
    name = "model-00001-of-00003.safetensors"
    data = (release / name).read_bytes()
    source = hub_source(release)
    header, heads = source.tensors, {name: file.digest for name, file in source.files.items()}
    info = next(t for t in header.values() if t.file == name and t.start > 2 * WINDOW)
    first = True

    def fetch(path: str, start: int, stop: int) -> bytes:
        nonlocal first
        part = data[start:stop]
        if first:
            first = False
            return bytes([part[0] ^ 1]) + part[1:]
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "KEPT", 1)
        patch.setattr(stream, "AHEAD", 1)
        with StreamReader(header, snapshot, headers=heads, fetch=fetch) as reader:

            def go() -> None:
                reader.read(info.name)  # out of order: nothing before it was read
                reader.complete(name)

            with pytest.raises(HubError, match=r"arrived damaged: bytes from .* differ when read"):
                go()
            assert not reader.verified


def test_what_nobody_asks_for_is_read_on_the_way(release, monkeypatch):
    """Work that begins in the middle of a file leaves nothing before it to be read again for."""
    monkeypatch.setattr(stream, "KEPT", stream.AHEAD + 1)
    snapshot = hub.resolve_revision(REPO)
    name = "model-00001-of-00003.safetensors"
    data = (release / name).read_bytes()
    source = hub_source(release)
    heads = {name: file.digest for name, file in source.files.items()}
    later = [t for t in source.tensors.values() if t.file == name and t.start > 3 * WINDOW]
    asked = []

    def fetch(path: str, start: int, stop: int) -> bytes:
        asked.append(start)
        return data[start:stop]

    with StreamReader(source.tensors, snapshot, headers=heads, fetch=fetch) as reader:
        for info in sorted(later, key=lambda t: t.start):
            with reader.noting(name, info.start) as files:
                reader.read(info.name)
            assert files == {name}
        reader.complete(name)
    assert sorted(asked) == list(range(0, len(data), WINDOW))


@pytest.fixture
def shard(release):
    """Opens readers of a shard, and says how many windows it has."""
    snapshot = hub.resolve_revision(REPO)
    source = hub_source(release)
    heads = {name: file.digest for name, file in source.files.items()}
    name = "model-00001-of-00003.safetensors"
    data = (release / name).read_bytes()
    tensors = sorted((t for t in source.tensors.values() if t.file == name), key=lambda t: t.start)

    def opened(fetch, **more):
        return StreamReader(source.tensors, snapshot, headers=heads, fetch=fetch, **more)

    return SimpleNamespace(open=opened, name=name, data=data, tensors=tensors)


def test_a_window_that_does_not_come_ends_every_thread(shard):
    """Each would try as long again; the first error is everybody's."""
    asked = []

    def fetch(path: str, start: int, stop: int) -> bytes:
        asked.append(start)
        if len(asked) < 3:
            return shard.data[start:stop]
        raise HubError(f"failure {len(asked)}")

    def go(info):
        with reader.noting(info.file, info.start):
            return reader.read(info.name)

    with shard.open(fetch) as reader, ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(go, info) for info in shard.tensors]
        errors = [error for task in tasks if (error := task.exception()) is not None]
        with pytest.raises(HubError, match="failure"):
            reader.complete(shard.name)
    assert len(errors) > 2
    assert len(set(map(str, errors))) == 1
    assert len(asked) < 3 + stream.CONNECTIONS


def test_who_is_interrupted_while_waiting_stands_in_nobodys_way(monkeypatch):
    turns = stream._Turns()
    first, second, third = (turns.ticket() for _ in range(3))
    with turns.turn(first):
        with monkeypatch.context() as patch:
            interrupt = Mock(side_effect=KeyboardInterrupt)
            patch.setattr(turns._changed, "wait_for", interrupt)
            with pytest.raises(KeyboardInterrupt), turns.turn(second):
                pass
        done = threading.Event()

        def last():
            with turns.turn(third):
                done.set()

        threading.Thread(target=last, daemon=True).start()
    assert done.wait(10)


def test_a_second_pass_reads_ahead_as_the_first_did(shard):
    """Several connections at once, and every window once."""
    largest = max(shard.tensors, key=lambda t: t.nbytes)
    count = (largest.stop - 1) // WINDOW - largest.start // WINDOW + 1
    assert count > stream.AHEAD
    together = threading.Barrier(stream.CONNECTIONS)
    asked, again = [], False

    def fetch(path: str, start: int, stop: int) -> bytes:
        asked.append(start)
        if again and len(asked) <= stream.CONNECTIONS:
            together.wait(30)
        return shard.data[start:stop]

    with shard.open(fetch) as reader:
        reader.read(largest.name)
        reader.complete(shard.name)
        reader._ready.clear()
        asked.clear()
        again = True
        reader.read(largest.name)
    assert len(asked) == count
    assert sorted(asked) == sorted(set(asked))


def test_windows_are_pages_of_their_own(shard, faults):
    snapshot = hub.resolve_revision(REPO)
    found = hub_snapshot.fetch_window(snapshot, shard.name, 8, 99)
    assert isinstance(found, mmap)  # not of an allocator, nor a copy of what is
    assert bytes(found) == shard.data[8:99]
