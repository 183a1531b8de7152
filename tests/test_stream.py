"""--stream: weights read by range from the hub, through the real client and the hub's faults."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations
from pathlib import Path

import pytest
from huggingface_hub import constants
from mtp_twins import make_mtp_twin
from release_helpers import FOUR_BIT, hashes, llama_tensors, make, status
from stream_helpers import (
    CONFIG,
    MIXTRAL,
    REPO,
    SHARDS,
    WINDOW,
    converted,
    hub_source,
    mixtral_tensors,
    publish,
    ranges,
    streamed,
    write_shards,
)

from converter import hub
from converter.errors import GateError, HubError, PlanError
from converter.execute import run
from converter.execute.journal import NAME
from converter.hub import api as hub_api
from converter.hub import snapshot as hub_snapshot
from converter.hub import stream
from converter.hub.stream import StreamReader
from converter.plan import Options
from converter.proof import require_proof
from converter.staging import Fault

WEIGHTS = r"resolve/.*/model-0000\d"
pytestmark = pytest.mark.usefixtures("small_windows")


@pytest.fixture
def arm(faults, monkeypatch):
    """Adds faults once everything is planned, so that they strike what is read of the weights."""

    def when_opened(*wanted: Fault) -> None:
        def armed(snapshot, tensors, **more):
            for fault in wanted:
                faults.add(fault)
            monkeypatch.setattr(hub, "open_stream", stream.open_stream)
            return stream.open_stream(snapshot, tensors, **more)

        monkeypatch.setattr(hub, "open_stream", armed)

    return when_opened


@pytest.fixture
def release(tmp_path, api):
    folder = write_shards(tmp_path / "in" / "model", CONFIG, llama_tensors(CONFIG))
    publish(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "recipe", "workers"),
    [(CONFIG, Options(), 2), (MIXTRAL, FOUR_BIT, 2), (MIXTRAL, FOUR_BIT, 16)],
    ids=["llama", "experts-4bit", "experts-16-threads"],
)
def test_same_bytes_as_from_a_folder(tmp_path, api, faults, config, recipe, workers):
    tensors = llama_tensors(config) if config is CONFIG else mixtral_tensors()
    folder = write_shards(tmp_path / "in" / "model", config, tensors)
    publish(folder)
    expected = converted(folder, tmp_path / "local", recipe)
    before = len(faults.requests)
    assert streamed(tmp_path, "out", recipe, workers=workers) == expected
    del faults.requests[:before]
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    # Headers for the plan, then every window of every file once.
    assert ranges(faults) == {name: -(-size // WINDOW) + 1 for name, size in sizes.items()}


TIED = CONFIG | {"tie_word_embeddings": True}


def tied_release(root: Path, *, same: bool = True) -> Path:
    """One whose head is stored beside the table that it is tied to, in another file."""
    tensors = llama_tensors(CONFIG)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0 if same else 1
    folder = write_shards(root, TIED, tensors | {"lm_head.weight": head})
    files = {t.file for name, t in hub_source(folder).tensors.items() if t.shape == head.shape}
    assert len(files) == 2
    publish(folder)
    return folder


def test_a_tied_head_is_compared_as_it_goes_by(tmp_path, api, faults, monkeypatch):
    """With the table, of which nothing is left in memory by then."""
    folder = tied_release(tmp_path / "in" / "model")
    expected = converted(folder, tmp_path / "local")
    monkeypatch.setattr(stream, "KEPT", stream.AHEAD + 1)
    faults.requests.clear()
    assert streamed(tmp_path, "out", workers=1) == expected
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert ranges(faults) == {name: -(-size // WINDOW) + 1 for name, size in sizes.items()}


def test_a_head_that_is_not_what_it_is_tied_to_is_refused(tmp_path, api):
    tied_release(tmp_path / "in" / "model", same=False)
    with pytest.raises(PlanError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        streamed(tmp_path, "out")
    assert not (tmp_path / "out").exists()


def test_a_drafter_reads_only_its_own_tensors_again(tmp_path, api, faults, monkeypatch):
    """In its pass over files that are known to be whole."""
    window = 8 * WINDOW
    monkeypatch.setattr(stream, "WINDOW", window)
    folder = make_mtp_twin("qwen3_5", tmp_path / "in" / "model")
    publish(folder)
    asked = {"mtp": True, "workers": 4}
    expected = [hashes(out) for out in make(folder, tmp_path / "local", **asked)]
    faults.requests.clear()
    cache = tmp_path / "cache"
    found = [hashes(o) for o in make(REPO, tmp_path / "out", stream=True, cache=cache, **asked)]
    assert len(found) == 2
    for hashed in (*expected, *found):
        del hashed["conversion.json"]
    assert found == expected
    source = hub_source(folder)
    (file,) = source.files.values()
    drafted = [t for name, t in source.tensors.items() if name.startswith("mtp.")]
    again = {w for t in drafted for w in range(t.start // window, -(-t.stop // window))}
    assert 0 < len(again) < file.size // window // 5
    # The header for the plan, every window once, and what the second pass needs.
    assert ranges(faults).total() <= 1 + -(-file.size // window) + len(again)


def test_the_disk_holds_no_weights(tmp_path, release, monkeypatch):
    """Beside the output there are only the small files, at every moment of the conversion."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    whole = sum(file.stat().st_size for file in release.glob("*.safetensors"))
    most = 0
    original = StreamReader._load

    def measured(self, state, number):
        nonlocal most
        for root in (cache, tmp_path / "home"):
            files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
            most = max(most, sum(file.stat().st_size for file in files))
        return original(self, state, number)

    monkeypatch.setattr(StreamReader, "_load", measured)
    assert streamed(tmp_path, "out", FOUR_BIT)
    assert 0 < most < 10_000 < whole
    assert sorted(path.name for path in out.parent.glob("out*")) == ["out"]
    assert not list(out.parent.glob(".out*"))


def test_little_memory_gives_the_same_bytes(tmp_path, release, monkeypatch):
    monkeypatch.setattr(stream, "KEPT", 1)
    expected = converted(release, tmp_path / "local", FOUR_BIT)
    assert streamed(tmp_path, "out", FOUR_BIT) == expected


def test_damage_of_the_same_size_leaves_no_output(tmp_path, release, faults, arm):
    expected = converted(release, tmp_path / "local")
    arm(Fault("corrupt", "GET", r"resolve/.*/model-00002"))
    with pytest.raises(HubError, match=r"model-00002.* of acme/model arrived damaged") as told:
        make(REPO, tmp_path / "out", stream=True, cache=tmp_path / "cache", workers=1)
    assert told.value.exit_code == 5
    assert not (tmp_path / "out").exists()
    (work,) = tmp_path.glob(".out.*.partial")
    assert not (work / "conversion.json").exists()
    faults.requests.clear()
    assert streamed(tmp_path, "out") == expected
    again = ranges(faults)
    assert again["model-00001-of-00003.safetensors"] == 1, "a whole file was read again"
    assert again["model-00002-of-00003.safetensors"] > 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("refuse", "GET", WEIGHTS, status=429, times=9, headers=(("retry-after", "3"),)),
        Fault("refuse", "GET", WEIGHTS, status=503, times=9),
        Fault("truncate", "GET", WEIGHTS, times=9),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_what_passes_is_waited_for(tmp_path, release, faults, arm, fault):
    expected = converted(release, tmp_path / "local")
    arm(fault)
    assert streamed(tmp_path, "out") == expected
    assert sum(faults.struck.values()) == 9


def test_an_ignored_range_is_asked_for_again(tmp_path, release, faults):
    snapshot = hub.resolve_revision(REPO)
    name = "model-00001-of-00003.safetensors"
    faults.add(Fault("ignore_range", "GET", WEIGHTS, times=3))
    found = hub_snapshot.fetch_window(snapshot, name, 8, 99)
    assert bytes(found) == (release / name).read_bytes()[8:99]
    faults.add(Fault("ignore_range", "GET", WEIGHTS, times=99))
    with pytest.raises(HubError, match="ignored a Range request"):
        hub_snapshot.fetch_window(snapshot, name, 8, 99)


def test_redirects_are_followed(tmp_path, release, faults, api, arm):
    """As the hub sends large files to where they are stored."""
    expected = converted(release, tmp_path / "local")
    snapshot = hub.resolve_revision(REPO)
    moved = []
    for number in range(1, SHARDS + 1):
        path = f"/{REPO}/resolve/{snapshot.commit}/model-0000{number}-of-00003.safetensors"
        there = (("location", f"{api.endpoint}{path}?signature=x"),)
        moved.append(Fault("refuse", "GET", f"model-0000{number}", status=302, headers=there))
    arm(*moved)
    assert streamed(tmp_path, "out") == expected
    assert faults.struck["302"] == SHARDS


def test_a_branch_that_moves_changes_nothing(tmp_path, release, arm):
    expected = converted(release, tmp_path / "local")
    arm(Fault("move_branch", "GET", WEIGHTS))
    assert streamed(tmp_path, "out") == expected
    commit = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["commit"]
    assert commit != hub.resolve_revision(REPO).commit


KILLED = """
import os, signal, sys
from pathlib import Path
from converter.execute import run, units
from converter.hub import stream
from converter.pipeline import Request, convert
from converter.ui import Console
os.fsync = os.fdatasync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing
window, after, out, cache = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
stream.WINDOW = units.UNIT_BYTES = window
run.FLUSH_BYTES = window
original = stream.StreamReader._load
count = 0
def load(self, state, number):
    global count
    count += 1
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, state, number)
stream.StreamReader._load = load
request = Request(
    hf_path="acme/model", mlx_path=Path(out), stream=True, cache=Path(cache), workers=1
)
convert(request, Console(quiet=True))
"""


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, release, faults):
    expected = converted(release, tmp_path / "local")
    windows = -(-(release / "model-00001-of-00003.safetensors").stat().st_size // WINDOW)
    out, cache = tmp_path / "out", tmp_path / "cache"
    for number, after in enumerate((windows, windows + 12, 99999)):
        faults.requests.clear()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(WINDOW), str(after), str(out), str(cache)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        if after == 99999:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        (work,) = tmp_path.glob(".out.*.partial")
        kept = (work / NAME).read_bytes().count(b"\n") - 1
        assert (kept > 0) == (number > 0), "a unit counts once its file is known to be whole"
    assert done.returncode == 0, done.stderr
    found = hashes(out)
    del found["conversion.json"]
    assert found == expected
    assert ranges(faults)["model-00001-of-00003.safetensors"] == 1, "read for its header only"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "downloaded"])
def test_a_header_that_arrived_damaged_is_found_out(tmp_path, release, monkeypatch, stream):
    """Two tensors of one shape change places in the answer that the plan was made by."""
    fetch = hub.fetch_range
    one, other = next(
        (f'"{a}"'.encode(), f'"{b}"'.encode())
        for (a, x), (b, y) in combinations(hub_source(release).tensors.items(), 2)
        if (x.file, x.shape, len(a)) == (y.file, y.shape, len(b))
    )

    def swapped(*given, **more):
        data = fetch(*given, **more)
        return data.replace(one, b"@").replace(other, one).replace(b"@", other)

    monkeypatch.setattr(hub, "fetch_range", swapped)
    with pytest.raises(HubError, match="header"):
        make(REPO, tmp_path / "out", stream=stream, cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_waiting_for_the_hub_ends_with_the_run(tmp_path, release, faults, arm, monkeypatch):
    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 600)
    arm(Fault("refuse", "GET", WEIGHTS, times=10**6))
    begun = threading.Event()
    pause = hub_api.pause

    def paused(*given, **more):
        begun.set()
        return pause(*given, **more)

    def interrupted(running, **more):
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_api, "pause", paused)
    monkeypatch.setattr(run, "wait", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        make(REPO, tmp_path / "out", stream=True, cache=tmp_path / "cache")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-q", "--q-method", "gptq"], "--q-method imatrix, gptq and autoround read the weights"),
        (["--q-target-bpw", "4.5"], "--q-target-bpw and --q-target-size read the weights"),
        (["--adapter-path", "."], "--adapter-path read the weights more than once"),
    ],
)
def test_what_needs_the_weights_here_is_refused_at_once(
    tmp_path, release, faults, capsys, flags, message
):
    out = tmp_path / "out"
    assert status("--hf-path", REPO, "--mlx-path", out, "--stream", "--quiet", *flags) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert max(ranges(faults).values()) == 1


def test_a_folder_is_not_streamed(tmp_path, release, capsys):
    assert status("--hf-path", release, "--mlx-path", tmp_path / "out", "--stream") == 2
    assert "is a folder, and nothing is fetched" in capsys.readouterr().err


def test_what_was_streamed_says_that_nothing_was_compared(tmp_path, api, twin_of, capsys):
    """A twin is compared with torch, the output with itself, and the verdict says so."""
    publish(twin_of("llama"))
    judged = []
    out = tmp_path / "out"
    command = ["--hf-path", REPO, "--mlx-path", out, "--stream", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # How twins are judged is tested with the batches, which judge one before every download.
        patch.setattr(
            "converter.streamed.judge_twin",
            lambda config, folder, workers: judged.append(config["model_type"]) or ("pass", ""),
        )
        assert status(*command) == 0
    assert judged == ["llama"]
    report = json.loads((out / "parity.json").read_text())
    assert report["verdict"] == "unproven"
    rows = {check["name"]: check for check in report["checks"]}
    assert "the weights were streamed (--stream)" in rows["reference"]["note"]
    assert rows["twin"]["verdict"] == "pass"
    assert rows["source files"]["verdict"] == "pass"
    assert rows["prefill = decode"]["verdict"] == "pass"
    assert not [check for check in report["checks"] if check["verdict"] == "fail"]
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("hub", "cache")]
    assert left == ["out"]
    assert not [path for path in (tmp_path / "cache").rglob("*.safetensors")]
    with pytest.raises(GateError, match="the weights were streamed"):
        require_proof(out)
    capsys.readouterr()
