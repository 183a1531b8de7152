"""Killed at any moment and resumed: the same bytes, without doing everything again."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from release_helpers import FOUR_BIT, LLAMA, hashes, llama_tensors, make, write_release

from converter.errors import ConvertError
from converter.execute import run, units
from converter.execute.journal import NAME, Journal

KILLS = 50
CONFIG = LLAMA | {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 2048}


class Server:
    """Conversions in a process that can be killed; see kill_server.py."""

    def __init__(self, source: Path) -> None:
        script = Path(__file__).with_name("kill_server.py")
        command = [sys.executable, str(script), str(source), str(32 << 10), str(1 << 20)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def convert(self, out: Path, *, kill_after: float | None = None) -> int:
        """Exit status of the conversion as waitpid gives it; 9 when it was killed."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        child = int(self.read())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(child, signal.SIGKILL)
        return int(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


def journaled(folder: Path) -> int:
    """Units that the journal of a work folder vouches for; a torn last line does not count."""
    path = folder / NAME
    if not path.is_file():
        return 0
    return sum(len(json.loads(line)) for line in path.read_bytes().split(b"\n")[1:-1])


def test_killed_at_fifty_moments(tmp_path):
    source = write_release(tmp_path / "in" / "release", CONFIG)
    server = Server(source)
    try:
        assert server.convert(tmp_path / "whole") == 0
        started = time.perf_counter()
        assert server.convert(tmp_path / "again") == 0
        duration = time.perf_counter() - started
        expected = hashes(tmp_path / "whole")
        assert expected == hashes(tmp_path / "in" / "warm"), "made without pauses and pieces"
        assert hashes(tmp_path / "again") == expected
        total = int((tmp_path / "whole.count").read_text())
        rng = random.Random(0)
        landed, skipped = 0, 0
        for number in range(KILLS):
            out = tmp_path / f"out{number}"
            killed = server.convert(out, kill_after=rng.uniform(0, duration)) == signal.SIGKILL
            work = list(out.glob(".*.partial")) if out.exists() else []
            visible = [p for p in out.glob("[!.]*")] if out.exists() else []
            for folder in visible:  # whatever looks finished is finished
                for name, digest in hashes(folder).items():
                    assert expected[f"{folder.name}/{name}"] == digest
                assert (folder / "conversion.json").is_file()
            kept = sum(map(journaled, work)) + len(visible) * total // 2
            assert server.convert(out) == 0
            for lock in out.glob(".*.lock"):  # after a kill right behind the last rename
                lock.unlink()
            assert hashes(out) == expected, f"kill {number}"
            assert int((tmp_path / f"out{number}.count").read_text()) == total - kept
            landed += killed and bool(work)
            skipped += 0 < kept < total
            shutil.rmtree(out)
    finally:
        server.close()
    assert landed >= KILLS // 4, f"only {landed} kills fell between the first write and the last"
    assert skipped >= KILLS // 8, f"only {skipped} resumed runs had anything to skip"


class Stopped(Exception):
    """Stands for the moment of a kill."""


@pytest.fixture
def source(tmp_path):
    return write_release(tmp_path / "in" / "release")


@pytest.fixture
def stop(source, tmp_path, monkeypatch):
    """Run a conversion that ends after some units; returns the work folder."""
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    monkeypatch.setattr(run, "FLUSH_BYTES", 2048)

    def go(after=100, out=tmp_path / "out"):
        count = iter(range(10**9))
        encode = run.encode

        def stopping(*arguments, **named):
            if next(count) >= after:
                raise Stopped
            return encode(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(run, "encode", stopping)
            with pytest.raises(Stopped):
                make(source, out, FOUR_BIT, workers=1)
        [work] = out.parent.glob(f".{out.name}.*.partial")
        return work

    return go


@pytest.fixture
def converted(monkeypatch):
    """Counts the units that a run converts."""
    count = [0]
    encode = run.encode

    def counting(*arguments, **named):
        count[0] += 1
        return encode(*arguments, **named)

    monkeypatch.setattr(run, "encode", counting)
    return count


@pytest.fixture
def expected(source, tmp_path):
    return hashes(make(source, tmp_path / "expected", FOUR_BIT)[0])


def test_what_is_done_is_not_done_again(source, stop, expected, converted, tmp_path):
    make(source, tmp_path / "whole", FOUR_BIT)
    total, converted[0] = converted[0], 0
    work = stop(100)
    done = journaled(work)
    assert done == 100
    converted[0] = 0
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    assert converted[0] == total - done
    assert hashes(out) == expected


def test_other_variants_of_a_resumed_pass(source, stop, expected, tmp_path):
    """A second job joins: it is done whole, the first only where it is unfinished."""
    work = stop(100, out=tmp_path / "both" / "release-4bit")
    assert journaled(work)
    from converter.plan import Options

    plain, four = make(source, tmp_path / "both", Options(), FOUR_BIT)
    assert hashes(four) == expected
    assert hashes(plain) == hashes(make(source, tmp_path / "plain")[0])


def test_garbage_where_the_journal_vouches_for_nothing(source, stop, expected, tmp_path):
    """A power cut leaves anything in blocks that were not flushed."""
    work = stop(100)
    file = work / "model.safetensors"
    lines = (work / NAME).read_bytes().splitlines(keepends=True)
    kept = {unit for line in lines[1:4] for unit in json.loads(line)}
    (work / NAME).write_bytes(b"".join(lines[:4]))
    from converter.pipeline import Request, plan_request

    planned = plan_request(Request(hf_path=str(source), recipes=(FOUR_BIT,)))
    plan = planned.plans[0]
    data = bytearray(file.read_bytes())
    safe = bytearray(len(data))
    for unit in units.units_of(planned.source, plan.outputs):
        if unit.number in kept:
            for tensor in plan.outputs[unit.output].stored.values():
                row = tensor.nbytes // tensor.shape[0]
                first, last = tensor.start + unit.start * row, tensor.start + unit.stop * row
                safe[first:last] = b"\1" * (last - first)
    assert 0 < sum(safe) < len(data)
    file.write_bytes(bytes(b if s else 0xA5 for b, s in zip(data, safe, strict=True)))
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    assert hashes(out) == expected


@pytest.mark.parametrize(
    "tail", [b"[1,2", b"[1,2]garbage\n[7]\n", b"\0\0\0\0\n", b"[null]\n", b"7\n"]
)
def test_torn_journal(source, stop, expected, converted, tmp_path, tail):
    work = stop(100)
    with (work / NAME).open("ab") as file:
        file.write(tail)
    converted[0] = 0
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    assert hashes(out) == expected
    assert converted[0] > 0


@pytest.mark.parametrize("head", [b"", b"{}", b"\0" * 500, b'{"plan": '])
def test_damaged_head_starts_over(source, stop, expected, tmp_path, head):
    work = stop(100)
    (work / NAME).write_bytes(head)
    assert hashes(make(source, tmp_path / "out", FOUR_BIT)[0]) == expected


def test_other_content_starts_over(source, stop, tmp_path):
    """The same headers, other weights: nothing that was written is of use."""
    work = stop(100)
    assert journaled(work)
    write_release(source, LLAMA, {name: -x for name, x in llama_tensors(LLAMA).items()})
    os.utime(source / "model.safetensors", ns=(1, 1))
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    assert hashes(out) == hashes(make(source, tmp_path / "fresh", FOUR_BIT)[0])


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_file_that_is_not_as_it_was_starts_over(source, stop, expected, tmp_path, damage):
    file = stop(100) / "model.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, 1000)
    assert hashes(make(source, tmp_path / "out", FOUR_BIT)[0]) == expected


def test_units_of_another_size_start_over(source, stop, expected, tmp_path, monkeypatch):
    stop(100)
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    assert hashes(make(source, tmp_path / "out", FOUR_BIT)[0]) == expected


def test_journal_says_what_was_recorded(tmp_path):
    identity = {"plan": "a"}
    journal = Journal(tmp_path, identity)
    journal.record([3, 1])
    journal.record([])
    journal.close()
    again = Journal(tmp_path, identity)
    assert again.resumed
    assert again.done == {1, 3}
    again.close()
    for other in (Journal(tmp_path, identity, trusted=False), Journal(tmp_path, {"plan": "b"})):
        assert not other.resumed
        other.close()


def test_journal_goes_on_behind_a_torn_line(tmp_path):
    for units_done, tail in (([1, 2], b"[3,"), ([3, 4], b"\0\0\n"), ([5], b"")):
        journal = Journal(tmp_path, {})
        journal.record(units_done)
        journal.close()
        with (tmp_path / NAME).open("ab") as file:
            file.write(tail)
    journal = Journal(tmp_path, {})
    journal.close()
    assert journal.done == {1, 2, 3, 4, 5}


def test_journal_on_a_full_disk(source, stop, expected, tmp_path, monkeypatch):
    work = stop(100)
    before = (work / NAME).read_bytes()
    calls = iter(range(100))

    def full(descriptor, line):
        if next(calls):
            raise OSError(28, "No space left on device")
        return real(descriptor, line[: len(line) // 2])

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr("converter.execute.journal.os.write", full)
        with pytest.raises(ConvertError, match="the disk is full"):
            make(source, tmp_path / "out", FOUR_BIT)
    assert (work / NAME).read_bytes().startswith(before)
    assert hashes(make(source, tmp_path / "out", FOUR_BIT)[0]) == expected
