"""One conversion in parts: by shards of the output, in processes that share a folder."""

import json
import multiprocessing
import os
import signal
import time

import part_worker
import pytest
from part_worker import RECIPES, SHARD_BYTES, make_part
from release_helpers import FOUR_BIT, LLAMA, hashes, make, status, write_release

from converter.errors import PlanError, UsageError
from converter.execute import folder as folder_module
from converter.execute.folder import locked, sharing
from converter.execute.parts import Part, most_parts
from converter.pipeline import Request, plan_request
from converter.plan import Options, layout
from quant.recipe import QuantSpec

CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setitem(layout.lay_out.__kwdefaults__, "shard_bytes", SHARD_BYTES)
    return write_release(tmp_path / "in" / "release", CONFIG)


@pytest.fixture
def whole(source, tmp_path):
    """The files of both outputs as one process makes them."""
    make(source, tmp_path / "whole", *RECIPES)
    return hashes(tmp_path / "whole")


def test_parts_in_any_order_give_the_same_files(source, whole, tmp_path):
    out = tmp_path / "out"
    for number in (3, 1, 2):
        assert make(source, out, *RECIPES, part=Part(number, 3)) == []
        assert not [path for path in out.iterdir() if not path.name.startswith(".")]
    make(source, out, *RECIPES)
    assert hashes(out) == whole


def test_what_no_part_made_is_made_at_the_end(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(source, out, *RECIPES, part=Part(2, 3))
    make(source, out, *RECIPES, part=Part(1, 4))  # of another count: what it shares is not redone
    opened = []
    reserve = part_worker.run._reserve
    monkeypatch.setattr(
        part_worker.run, "_reserve", lambda f, size: (opened.append(f), reserve(f, size))
    )
    make(source, out, *RECIPES)
    plans = plan_request(Request(hf_path=str(source), recipes=RECIPES)).plans
    files = sum(len(plan.shards) for plan in plans)
    made = sum(len({*Part(2, 3).shards(plan), *Part(1, 4).shards(plan)}) for plan in plans)
    assert len(opened) == files - made > 0
    assert hashes(out) == whole


def test_parts_cover_every_shard_once(source):
    plan = plan_request(Request(hf_path=str(source))).plans[0]
    assert len(plan.shards) > 4
    for count in range(1, len(plan.shards) + 3):
        parts = [Part(number, count).shards(plan) for number in range(1, count + 1)]
        assert [shard for part in parts for shard in part] == list(plan.shards)
    assert most_parts([plan]) == len(plan.shards)


def test_processes_make_the_bytes_of_one_and_a_killed_one_only_delays(source, whole, tmp_path):
    count = 4
    context = multiprocessing.get_context("forkserver")
    out = tmp_path / "out"

    def start(number, slowly=False):
        process = context.Process(target=make_part, args=(source, out, number, count, slowly))
        process.start()
        return process

    victim = start(1, slowly=True)
    others = [start(number) for number in range(2, count + 1)]
    deadline = time.monotonic() + 120
    journals = []
    while not any(path.read_bytes().count(b"\n") > 2 for path in journals):
        assert victim.is_alive()
        assert time.monotonic() < deadline
        journals = list(out.glob(f".*/.journal.jsonl.1-of-{count}"))
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    for process in others:
        process.join()
        assert process.exitcode == 0
    done = [len(line) for path in journals for line in path.read_bytes().split(b"\n")[1:-1]]
    assert done
    again = start(1)
    again.join()
    assert again.exitcode == 0
    make(source, out, *RECIPES)
    for lock in out.glob(".*.lock"):  # of the process that was killed
        lock.unlink()
    assert hashes(out) == whole


def test_a_record_of_other_weights_is_not_believed(source, tmp_path):
    out = tmp_path / "out"
    make(source, out, FOUR_BIT, part=Part(1, 2))
    changed = source / "model.safetensors"
    data = bytearray(changed.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 2] = b"\xc8\x42"  # 100 in bfloat16, in a tensor of the first part
    changed.write_bytes(data)
    make(source, out, FOUR_BIT)
    make(source, tmp_path / "fresh", FOUR_BIT)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_record_goes_when_its_file_is_written_anew(source, tmp_path, monkeypatch):
    out, file = tmp_path / "out", source / "model.safetensors"
    make(source, out, FOUR_BIT, part=Part(1, 2))
    first = file.read_bytes()
    data = bytearray(first)
    start = 8 + int.from_bytes(data[:8], "little")
    data[start : start + 2] = b"\xc8\x42"
    file.write_bytes(data)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("converter.pipeline._finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(source, out, FOUR_BIT)
    file.write_bytes(first)
    make(source, out, FOUR_BIT)
    make(source, tmp_path / "fresh", FOUR_BIT)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_part_made_again_keeps_its_record_and_a_torn_one_vouches_for_nothing(source, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        make(source, out, FOUR_BIT, part=Part(1, 2))
    (record,) = tmp_path.rglob(".done.*.json")
    plan = plan_request(Request(hf_path=str(source), recipes=(FOUR_BIT,))).plans[0]
    files = {shard.file for shard in Part(1, 2).shards(plan)}
    assert json.loads(record.read_text())["files"].keys() == files
    record.write_text("")
    make(source, out, FOUR_BIT)
    make(source, tmp_path / "fresh", FOUR_BIT)
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_damaged_part_leaves_the_others_alone(source, tmp_path):
    out = tmp_path / "out"
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    start = 8 + length + entries["model.embed_tokens.weight"]["data_offsets"][0]
    data[start : start + 2] = b"\xc0\x7f"
    path.write_bytes(data)
    make(source, out, part=Part(2, 2))
    with pytest.raises(PlanError, match=r"embed_tokens.weight, row 0, column 0 is NaN"):
        make(source, out, part=Part(1, 2))
    assert list(out.parent.glob(".out.*.partial/.done.2-of-2.json"))
    with pytest.raises(PlanError, match="embed_tokens"):
        make(source, out)
    assert not list(out.parent.glob(".out.*"))


def test_a_part_and_the_whole_exclude_each_other(tmp_path):
    work = tmp_path / "work.partial"
    with sharing(work, "1-of-2"):
        with sharing(work, "2-of-2"):
            pass
        with pytest.raises(UsageError, match="another process"), sharing(work, "1-of-2"):
            pass
        with pytest.raises(UsageError, match="another process"), locked(work):
            pass
    with (
        locked(work),
        pytest.raises(UsageError, match="another process"),
        sharing(work, "1-of-2"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["work.partial"]
    assert folder_module.lock(work.with_suffix(".lock"), shared=False) is not None


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--shard", "0/2"], "--shard 0/2: give a part and their count, such as 2/4"),
        (["--shard", "3/2"], "--shard 3/2"),
        (["--shard", "1/2", "--upload-repo"], "--upload-repo is for the command that finishes"),
        (["--shard", "1/2", "--mtp"], "--mtp looks at the whole release"),
        (["--shard", "1/2", "-q", "--q-method", "gptq"], "looks at the whole release"),
        (["--shard", "1/2", "-q", "--q-target-bpw", "5"], "--q-target-bpw looks at the whole"),
    ],
)
def test_what_cannot_be_done_in_parts(source, tmp_path, flags, text, capsys):
    out = tmp_path / "out"
    assert status("--hf-path", source, "--mlx-path", out, *flags) == 2
    assert text in capsys.readouterr().err
    assert not out.exists()


def test_the_command_line(source, tmp_path, capsys):
    asked = ["--hf-path", source, "-q", "--q-bits", "4", "--no-validate"]
    for out, flags in (("a", []), ("b", ["--shard", "2/2"]), ("b", ["--shard", "1/2"]), ("b", [])):
        assert status(*asked, "--mlx-path", tmp_path / out, *flags) == 0
    assert "made: part 2/2" in capsys.readouterr().err
    quant = QuantSpec.make("affine", 4, 64)
    make(source, tmp_path / "c", Options(quant=quant))
    for name, digest in hashes(tmp_path / "a").items():
        if name != "conversion.json":  # which holds the command
            assert hashes(tmp_path / "b")[name] == digest == hashes(tmp_path / "c")[name]
