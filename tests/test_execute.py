"""Executing plans: what comes out does not depend on how it is made."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from release_helpers import (
    FOUR_BIT,
    LLAMA,
    hashes,
    llama_tensors,
    make,
    same_bits,
    status,
    stored,
    write_release,
)

from converter.atomic import write_atomic, write_named
from converter.errors import ConvertError, UsageError
from converter.execute import run, units
from converter.execute.folder import explain, os_error_text
from converter.pipeline import Request, plan_request
from converter.plan import Options
from quant.recipe import QuantSpec


@pytest.fixture
def release(tmp_path):
    return write_release(tmp_path / "in" / "release")


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    monkeypatch.setattr(run, "FLUSH_BYTES", 4096)


def test_plain_copy_holds_the_bits_of_the_source(release, tmp_path):
    [out] = make(release, tmp_path / "out")
    assert {k: v.tobytes() for k, v in stored(out).items()} == {
        k: v.tobytes() for k, v in llama_tensors(LLAMA).items()
    }


@pytest.mark.parametrize("recipe", [Options(), Options(dtype="float16"), FOUR_BIT])
def test_workers_and_unit_sizes_do_not_show(release, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    expected = hashes(make(release, tmp_path / "whole", recipe)[0])
    monkeypatch.setattr(run, "FLUSH_BYTES", 4096)
    for workers, unit_bytes, piece_bytes in ((1, 256, 64), (2, 1000, 300), (5, 333, 1000)):
        monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(units, "PIECE_BYTES", piece_bytes)
        [out] = make(release, tmp_path / f"w{workers}", recipe, workers=workers)
        assert hashes(out) == expected


def test_units_and_their_pieces_cover_every_row_once(release, small_units, monkeypatch):
    monkeypatch.setattr(units, "PIECE_BYTES", 100)
    planned = plan_request(Request(hf_path=str(release)))
    outputs = planned.plans[0].outputs
    made = units.units_of(planned.source, outputs)
    assert [unit.number for unit in made] == list(range(len(made)))
    assert any(len(list(unit.pieces())) > 1 for unit in made)
    for index, out in enumerate(outputs):
        rows = [r for u in made if u.output == index for r in range(u.start, u.stop)]
        assert rows == list(range(out.expr.shape[0]))
        pieces = [piece for u in made if u.output == index for piece in u.pieces()]
        assert [r for start, stop in pieces for r in range(start, stop)] == rows
    assert (
        sorted(units.reading_order(planned.source, outputs, made), key=lambda u: u.number) == made
    )


def test_source_is_read_front_to_back(release, small_units, tmp_path):
    planned = plan_request(Request(hf_path=str(release)))
    outputs, source = planned.plans[0].outputs, planned.source
    order = units.reading_order(source, outputs, units.units_of(source, outputs))
    places = [(source.tensors[outputs[u.output].rule.target].start, u.start) for u in order]
    assert places == sorted(places)


def test_outputs_grow_from_the_front(release, small_units, tmp_path, monkeypatch):
    """However the source is sorted, so that hashing keeps up with what is written."""
    path = release / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body, backwards = json.loads(data[8 : 8 + size]), data[8 + size :], b""
    for entry in reversed([entry for name, entry in header.items() if name != "__metadata__"]):
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = [len(backwards), len(backwards) + stop - start]
        backwards += body[start:stop]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + backwards)
    written, write = [], run.Job.write

    def watch(job, file, offset, array):
        written.append((file, offset))
        write(job, file, offset, array)

    monkeypatch.setattr(run.Job, "write", watch)
    make(release, tmp_path / "out", workers=1)
    assert written == sorted(written)


def test_several_shards_hold_what_one_holds(release, tmp_path, monkeypatch):
    from converter.plan import layout

    whole = stored(make(release, tmp_path / "one")[0])
    lay_out = layout.lay_out.__kwdefaults__
    monkeypatch.setitem(lay_out, "shard_bytes", 20_000)
    [out] = make(release, tmp_path / "many")
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    parts = stored(out)
    assert list(parts) == sorted(whole)
    assert all(same_bits(parts[name], whole[name]) for name in whole)


def test_rows_that_do_not_divide_stay_plain(tmp_path):
    config = LLAMA | {"intermediate_size": 80}
    source = write_release(tmp_path / "in", config)
    [out] = make(source, tmp_path / "out", FOUR_BIT)
    tensors = stored(out)
    down = "model.layers.0.mlp.down_proj.weight"
    assert same_bits(tensors[down], llama_tensors(config)[down])
    assert "model.layers.0.mlp.gate_proj.scales" in tensors
    plan = plan_request(Request(hf_path=str(source), recipes=(FOUR_BIT,))).plans[0]
    kept = {o.rule.target: o.kept for o in plan.outputs if o.kept}
    assert kept[down] == "rows of 80 do not divide into 32"


def test_zero_groups_stay_zero(tmp_path):
    tensors = llama_tensors(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][:] = 0
    source = write_release(tmp_path / "in", LLAMA, tensors)
    for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
        made = make(source, tmp_path / mode, Options(quant=QuantSpec.make(mode)))
        [back] = make(made[0], tmp_path / f"{mode}-plain", dequantize=True)
        assert not stored(back)[name].astype(np.float32).any()


def test_output_must_not_destroy_the_source(release, tmp_path):
    before = hashes(release)
    link = tmp_path / "link"
    link.symlink_to(release)
    for out in (release, release / "mlx", release.parent, link, release / ".." / "release"):
        with pytest.raises(UsageError, match="overlap; choose another --mlx-path"):
            make(release, out, overwrite=True)
    assert hashes(release) == before


def test_finished_output_is_replaced_only_when_asked(release, tmp_path):
    [out] = make(release, tmp_path / "out")
    (out / "parity.json").write_text("{}")
    before = hashes(out)
    with pytest.raises(UsageError, match="holds a finished conversion; use --overwrite"):
        make(release, out, FOUR_BIT)
    assert hashes(out) == before
    make(release, out, FOUR_BIT, overwrite=True)
    assert hashes(out) == hashes(make(release, tmp_path / "fresh", FOUR_BIT)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "in", "out"]


def test_folder_with_other_things_is_left_alone(release, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not empty; use --overwrite"):
        make(release, out)
    assert hashes(out).keys() == {"thesis.txt"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_current_folder_is_no_output(release, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "below").mkdir(parents=True)
    for place, out in ((here, "."), (here, here), (here / "below", "..")):
        monkeypatch.chdir(place)
        with pytest.raises(UsageError, match="is the current folder or holds it"):
            make(release, Path(out), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "in"]


def test_path_through_a_file(release, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "mlx", tmp_path / "file" / "a" / "mlx"):
        with pytest.raises(ConvertError, match="a part of this path is a file, not a folder") as e:
            make(release, out)
        assert e.value.exit_code == 1
    with pytest.raises(UsageError, match="exists and is no folder"):
        make(release, tmp_path / "file")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_failing_disk_is_one_paragraph_and_can_go_on(release, tmp_path, monkeypatch, code):
    """Every write from the tenth on fails, as on a disk that is full or taken away."""
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    calls = iter(range(10**9))
    pwrite = os.pwrite

    def failing(descriptor, data, offset):
        if next(calls) >= 40:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(run.os, "pwrite", failing)
        with pytest.raises(ConvertError) as caught:
            make(release, tmp_path / "out" / "mlx", FOUR_BIT)
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert message == os_error_text(OSError(code, os.strerror(code)), message.partition(":")[0])
    assert "\n" not in message
    [left] = (tmp_path / "out").iterdir()
    assert left.name.startswith(".mlx.")
    assert left.name.endswith(".partial")
    assert not (left / "conversion.json").exists()
    done = (left / ".journal.jsonl").read_text().splitlines()
    assert len(done) > 1, "what was written before is kept"
    [out] = make(release, tmp_path / "out" / "mlx", FOUR_BIT)
    assert hashes(out) == hashes(make(release, tmp_path / "other", FOUR_BIT)[0])


def test_error_texts():
    def text(code):
        return os_error_text(OSError(code, os.strerror(code)), "OUT")

    assert text(errno.ENOSPC).startswith("OUT: the disk is full. Nothing unfinished looks finished")
    assert text(errno.EROFS) == "OUT: no permission to write here; choose another --mlx-path."
    assert text(errno.EIO) == "OUT: Input/output error"
    with (
        pytest.raises(ConvertError, match=r"^OUT: no permission .* choose another --html\.$"),
        explain(Path("OUT"), "--html"),
    ):
        raise PermissionError(errno.EACCES, "denied")


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("converter.atomic.os.fsync", full)
        with pytest.raises(OSError, match=r"report\.html'$"):
            write_atomic(path, "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "before")]
    write_atomic(path, "größer")
    assert path.read_bytes() == "größer".encode()


def test_a_place_that_the_user_names_stays_what_it_is(tmp_path):
    (tmp_path / "pages").mkdir()
    link = tmp_path / "latest.html"
    link.symlink_to(Path("pages", "today.html"))
    for text in ("made", "replaced"):
        write_named(link, text)
        assert link.is_symlink()
        assert (tmp_path / "pages" / "today.html").read_text() == text
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_named(pipe, "größer")
        assert os.read(reading, 100) == "größer".encode()
    finally:
        os.close(reading)
    assert pipe.is_fifo()
    device = tmp_path / "device"
    device.symlink_to("/dev/null")
    write_named(device, "nothing")
    assert device.is_char_device()
    longest = tmp_path / ("n" * 250 + ".html")
    write_named(longest, "x")
    assert longest.read_text() == "x"


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_page_that_cannot_be_written_names_its_own_flag(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("converter.reporting.gather", lambda places: {"runs": []})
    monkeypatch.setattr("validate.runs.runs_html", lambda runs: "")
    monkeypatch.setattr("converter.comparing.compare", lambda *given: {})
    monkeypatch.setattr("validate.compare_report.comparison_html", lambda report: "")
    html = tmp_path / "file" / "page.html"
    assert status(command, tmp_path, "--html", html, "--json") == 1
    assert capsys.readouterr().err == (
        f"{html}: a part of this path is a file, not a folder; choose another --html.\n"
    )


def test_failed_flush_is_never_followed_by_a_record(release, tmp_path, monkeypatch):
    """Systems report lost writes once; a second flush that succeeds proves nothing."""
    monkeypatch.setattr(units, "UNIT_BYTES", 256)
    monkeypatch.setattr(run, "FLUSH_BYTES", 4096)
    calls = iter(range(10**9))

    def datasync(descriptor):
        if next(calls) == 1:  # of at least two: when enough is written, and at the end
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(run, "_datasync", datasync)
    with pytest.raises(ConvertError, match="lost"):
        make(release, tmp_path / "out", FOUR_BIT)
    [left] = tmp_path.glob(".out.*.partial")
    assert len((left / ".journal.jsonl").read_text().splitlines()) == 2  # header, one flush


def test_what_a_killed_replacement_left_is_removed(release, tmp_path):
    [out] = make(release, tmp_path / "out")
    out.rename(tmp_path / ".out.replaced")  # killed between the two renames of --overwrite
    make(release, tmp_path / "out", FOUR_BIT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_file_larger_than_the_system_allows(program, release, tmp_path):
    """A real limit on a real process."""
    import subprocess

    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + program[2]
    flags = ("--hf-path", release, "--mlx-path", tmp_path / "out" / "mlx", "--no-validate")
    command = [program[0], "-c", code, *map(str, flags), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "files as large as this output's are not allowed here" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")] == []
