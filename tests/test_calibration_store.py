"""The store of statistics: damaged, interrupted, shared by processes, on a full disk."""

import errno
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from release_helpers import hashes, make, status

from converter.plan import Options
from quant.calibrate.calls import Call
from quant.calibrate.store import Store, cache_folder
from quant.calibrate.text import calibration_of
from quant.recipe import QuantSpec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arrays(part):
    return {f"layer.{part}": np.full((4, 3), part, np.float32)}


def states(part):
    shared = torch.full((2, 3), float(part)).T
    return [{"": torch.full((1, 2), float(part)), "kv/a/0": shared, "kv/a/1": shared}] * 2


def begun(parts=3):
    store = Store("codes", {"of": "a test"})
    for part in range(parts):
        store.put(part, arrays(part), states(part))
    return Store("codes", {"of": "a test"})


def finished():
    store = begun()
    store.finish(3)
    return Store("codes", {"of": "a test"})


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_was_begun_is_taken_up_whole():
    part, rows = begun().begun()
    assert part == 3
    assert len(rows) == 2
    for row in rows:
        assert {n: t.tolist() for n, t in row.items()} == {
            n: t.tolist() for n, t in states(2)[0].items()
        }


def test_tuples_in_containers_keep_their_order():
    mixed = (torch.zeros(2, dtype=torch.float16), torch.ones(3, dtype=torch.int64), torch.ones(4))
    many = tuple(torch.full((1,), float(i)) for i in range(12))
    store = Store("codes", {"of": "tuples"})
    store.put(0, arrays(0), [Call((), {"kv": {"mixed": mixed, "many": many}}).shared()])
    _, rows = Store("codes", {"of": "tuples"}).begun()
    again = Call((), {"kv": {}})
    again.share(rows[0])
    held = again.named["kv"]
    assert [t.dtype for t in held["mixed"]] == [t.dtype for t in mixed]
    assert torch.cat(held["many"]).tolist() == list(range(12))


@pytest.mark.parametrize("name", ["part-00001.safetensors", "states.safetensors", "begun.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_what_is_damaged_is_not_gone_on_with(name, damage):
    store = begun()
    path = store.folder / name
    if damage == "flip":
        flipped(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    assert store.begun() == (0, [])


@pytest.mark.parametrize("name", ["part-00001.safetensors", "done.json"])
def test_damaged_statistics_are_told_of_and_made_again(name):
    store, said = finished(), []
    assert store.finished(said.append) is not None
    assert said == []
    (store.folder / name).write_bytes((store.folder / name).read_bytes()[:-1])
    made = store.get(lambda: begun().finish(3), said.append)
    assert made["layer.2"].tolist() == arrays(2)["layer.2"].tolist()
    assert any("is damaged and made again" in line for line in said)
    assert store.finished(said.append) is not None


def test_a_second_process_waits_and_takes_what_the_first_made():
    first, second = (Store("codes", {"of": "a test"}) for _ in range(2))
    inside, go_on, found, said = threading.Event(), threading.Event(), [], []

    def make_slowly():
        inside.set()
        assert go_on.wait(10)
        first.put(0, arrays(0))
        return first.finish(1)

    def never():
        raise AssertionError("made twice")

    def tell(line):
        said.append(line)
        go_on.set()

    threads = [threading.Thread(target=lambda: found.append(first.get(make_slowly, str)))]
    threads[0].start()
    assert inside.wait(10)
    threads.append(threading.Thread(target=lambda: found.append(second.get(never, tell))))
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert len({one.digest for one in found}) == 1
    assert len(found) == 2
    assert "waiting for another process" in said[0]


def test_a_full_disk_leaves_what_was_whole():
    store = begun(2)
    script = (
        "import resource, sys, numpy as np\n"
        "from quant.calibrate.store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "store = Store('codes', {'of': 'a test'})\n"
        "try:\n"
        "    store.put(2, {'x': np.zeros(9000)})\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == errno.EFBIG
    assert not list(store.folder.glob(".part*"))
    assert store.begun()[0] == 2


def test_a_limit_on_files_is_one_sentence_and_the_next_run_goes_on(twin_of, tmp_path, capsys):
    source, text = twin_of("llama", "bfloat16"), tmp_path / "text.txt"
    text.write_text("one two three " * 2000)
    flags = ["--hf-path", source, "-q", "--q-method", "gptq", "--calibration-data", text]
    flags += ["--calibration-sequences", "2", "--calibration-length", "16", "--no-validate"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        assert status(*flags, "--mlx-path", tmp_path / "out") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = " ".join(capsys.readouterr().err.split())
    assert "files as large as this output's are not allowed here" in said
    assert "choose another XDG_CACHE_HOME" in said
    assert status(*flags, "--mlx-path", tmp_path / "out") == 0
    recipe = Options(
        quant=QuantSpec.make("affine", 4, method="gptq"),
        calibration=calibration_of(text, sequences=2, length=16),
    )
    for file in sorted(cache_folder().glob("*.gptq/part-00001.safetensors")):
        flipped(file)
    again = make(source, tmp_path / "again", recipe, calibration_data=text)[0]
    name = "model.safetensors"
    assert hashes(again)[name] == hashes(tmp_path / "out")[name]
