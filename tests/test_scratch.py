"""What killed processes leave: the next one removes it, and nothing of a live one's."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from converter.atomic import write_atomic
from converter.scratch import scratch
from quant.calibrate.aside import temporary

ROOT = Path(__file__).parents[1]
SCRATCH = """
import sys, time
from pathlib import Path
from converter.scratch import scratch
with scratch("reference", Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("large")
    print(folder, flush=True)
    time.sleep(600)
"""
DRAFT = """
import os, sys, time
from pathlib import Path
from converter import atomic
def stuck(descriptor):
    print("in it", flush=True)
    time.sleep(600)
atomic.os.fsync = stuck
atomic.write_atomic(Path(sys.argv[1]), "never")
"""
ASIDE = """
import sys, time
from quant.calibrate.aside import temporary
with temporary("hidden") as folder:
    (folder / "states").write_text("large")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start():
    """Starts a program that holds something, and says what it said of that."""
    running = []

    def started(code, path):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process, process.stdout.readline().strip()

    yield started
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_proofs_weights_go_with_the_next_ones(tmp_path, start):
    out = tmp_path / "Qwen2.5-4bit"
    process, said = start(SCRATCH, out)
    left = Path(said)
    with scratch("plain", out) as mine:
        assert (left / "weights").is_file(), "its process lives"
        assert mine.parent == left.parent
        assert mine.name.startswith(".Qwen2.5-4bit.plain-")
    assert not mine.exists()
    kill(process)
    with scratch("twin", tmp_path / "Qwen2.5-8bit"):
        assert left.is_dir(), "of another output"
    with scratch("plain", out) as mine:
        assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == [mine]
    assert list(tmp_path.iterdir()) == []


def test_nested_folders_of_one_output_leave_each_other_alone(tmp_path):
    out = tmp_path / "out"
    with scratch("plain", out) as outer, scratch("reference", out) as inner:
        with scratch("reference", out, parent=inner) as innermost:
            assert outer.is_dir()
            assert innermost.parent == inner
        assert inner.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_taken_for_abandoned_is_made_under_another_name(tmp_path, monkeypatch):
    """Between being made and being held its lock looks like that of one of the dead."""
    lock, seen = fcntl.flock, []

    def late(descriptor, how):
        if not seen:
            seen.extend(tmp_path.iterdir())
            raise BlockingIOError
        return lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch("plain", tmp_path / "out") as mine:
        assert mine.is_dir()
        assert seen[0] != mine.with_suffix(".lock")
    assert not mine.exists()


def test_where_nothing_can_be_locked_folders_are_made_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch("plain", tmp_path / "out") as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writers_draft_goes_with_the_next_write(tmp_path, start):
    file = tmp_path / "report.json"
    process, _ = start(DRAFT, file)
    (draft,) = tmp_path.iterdir()
    foreign = tmp_path / ".0123456789abcdef.partial.txt"
    foreign.write_text("somebody else's")
    write_atomic(file, "one")
    assert draft.exists(), "its process lives"
    kill(process)
    write_atomic(file, "two")
    assert sorted(tmp_path.iterdir()) == [foreign, file]
    assert file.read_text() == "two"


@pytest.mark.parametrize("when", ["removed", "held"])
def test_a_draft_that_was_taken_for_abandoned_is_made_again(tmp_path, monkeypatch, when):
    """Between being made and being held it looks like one of the dead."""
    file = tmp_path / "file"
    lock, seen = fcntl.flock, []

    def late(descriptor, how):
        if not seen:
            seen.extend(tmp_path.iterdir())
            if when == "removed":
                seen[0].unlink()
            else:
                raise BlockingIOError
        return lock(descriptor, how)

    monkeypatch.setattr("converter.atomic.fcntl.flock", late)
    write_atomic(file, "content")
    monkeypatch.undo()
    write_atomic(file, "again")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "again"


def test_many_writers_of_one_folder_lose_nothing(tmp_path):
    def write(number):
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            write_atomic(tmp_path / str(number), str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        str(number): str(number) for number in range(4)
    }


def test_a_killed_pass_s_states_go_with_the_next_one(tmp_path, start, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mlx-dayzero" / "calibration" / "statistics.fisher").mkdir(parents=True)
    process, said = start(ASIDE, tmp_path)
    left = Path(said)
    with temporary("fisher") as mine:
        assert (left / "states").is_file(), "its process lives"
        assert mine.parent == left.parent
    kill(process)
    with temporary("fisher") as mine, temporary("hidden") as other:
        there = {path for path in left.parent.iterdir() if path.suffix != ".lock"}
        assert there == {mine, other, left.parent / "statistics.fisher"}
    assert [path.name for path in left.parent.iterdir()] == ["statistics.fisher"]


def test_states_are_put_aside_where_nothing_can_be_locked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary("fisher") as other, temporary("hidden") as mine:
        assert other.is_dir(), "nobody knows whether its process lives"
        assert mine.is_dir()
    assert list(mine.parent.iterdir()) == []
