"""A Dask fleet: processes are killed, and everything is done once all the same."""

import signal
from dataclasses import replace

import pytest
from batch_helpers import add, close_ledgers, ledger, seen, story, wait_for, wanted
from fleet_helpers import WATCHLIST, Cluster
from release_helpers import LLAMA, hashes, make, status, write_release

from converter.batch.catalogue import Catalogue
from converter.batch.dask import Scheduler, asked, fits, offered
from converter.batch.recipes import Policy
from converter.batch.tags import measured, with_own
from converter.errors import UsageError
from converter.plan import Options, layout

LIMIT_S = 120


@pytest.fixture
def cluster(tmp_path):
    made = []

    def make_one(**settings):
        made.append(Cluster(tmp_path, **settings))
        return made[0]

    yield make_one
    made[0].close()
    close_ledgers()


def jobs(cluster):
    return {e.job.target[6:]: e for e in Catalogue(ledger(cluster.url)).entries()}


def ends(process, cluster, name="run"):
    assert process.wait(LIMIT_S) == 0, cluster.said(name)


def begun(cluster, stage, *names):
    """The releases whose stage has begun, once for each time, on any of these workers."""
    found = [line for name in names for line in story(cluster.root / name / "work")]
    return [repo for _, one, what, repo, _ in found if (one, what) == (stage, "begin")]


def test_what_is_lost_is_done_again_and_nothing_is_done_twice(cluster):
    fleet = cluster()
    catalogue = Catalogue(ledger(fleet.url))
    for name in ("once-convert-600", "slow-publish-1", "good", "better", "flaky-fetch"):
        add(catalogue, f"acme/{name}", "bf16", "4bit")
    workers = {name: fleet.worker(name) for name in ("w1", "w2")}
    runs = [fleet.run("run"), fleet.run("other")]  # two runs with one fleet do one job once
    wait_for(lambda: begun(fleet, "convert", "w1", "w2").count("acme/once-convert-600"))
    stuck = "w1" if "acme/once-convert-600" in begun(fleet, "convert", "w1") else "w2"
    workers[stuck].send_signal(signal.SIGKILL)
    workers[stuck].wait()
    fleet.scheduler.kill()
    fleet.scheduler.wait()
    fleet.scheduler = fleet.start_scheduler()
    fleet.worker(stuck)  # in the same folder, whose leases it ends
    for process, name in zip(runs, ("run", "other"), strict=True):
        ends(process, fleet, name)
    found = jobs(fleet)
    assert {entry.state for entry in found.values()} == {"published"}, fleet.said("run")
    assert found["once-convert-600-bf16"].job.lost == 1
    published = begun(fleet, "publish", "w1", "w2")
    assert sorted(published) == sorted([entry.release.repo for entry in found.values()])
    assert "the scheduler is away; what is in hand goes on" in fleet.said("w1") + fleet.said("w2")
    for name in ("w1", "w2"):
        work = fleet.root / name / "work"
        wait_for(lambda work=work: [p.name for p in work.iterdir()] in ([], ["story.jsonl"]), 60)
    for name in ("w1", "w2"):
        assert "Traceback" not in fleet.said(name)


def test_what_no_worker_has_is_waited_for(cluster):
    fleet = cluster(extra='[budgets]\nmemory = "3GB"\n')
    catalogue = Catalogue(ledger(fleet.url))
    add(catalogue, "acme/model", "bf16", policy=Policy(accept="metal"))
    large = replace(seen("acme/large"), weight_bytes=10**9)
    catalogue.enqueue(large, wanted("acme/large"))
    plain = fleet.worker("plain")
    ends(fleet.run(), fleet)
    found = jobs(fleet)
    assert {entry.state for entry in found.values()} == {"waiting"}
    assert found["large-bf16"].job.error == (
        "acme/large: needs 5.0 GB of memory where the largest worker has 3.0 GB"
    )
    job = found["model-bf16"].job
    assert (job.needs, job.error_class) == ("metal", "worker")
    assert job.error == (
        "waits for a worker tagged metal, which drives the output through the runtimes"
    )
    assert begun(fleet, "examine", "plain") == []  # it could not be carried over
    fleet.worker("apple", "metal", METAL="1")
    wait_for(lambda: "joined the fleet" in fleet.said("apple"))
    ends(fleet.run(), fleet)
    job = jobs(fleet)["model-bf16"].job
    assert (job.state, job.needs, job.error) == ("published", None, None)
    assert begun(fleet, "accept", "apple") == ["acme/model"]
    plain.terminate()
    assert plain.wait(LIMIT_S) == 143


CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 1024}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_two_and_four_workers_make_the_bytes_of_one(cluster, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from converter.staging import StagingOptions, running_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setitem(layout.lay_out.__kwdefaults__, "shard_bytes", 200_000)
    source = write_release(tmp_path / "source", CONFIG)
    make(source, tmp_path / "whole", Options(dtype="bfloat16"))
    expected = {n: h for n, h in hashes(tmp_path / "whole").items() if n != "conversion.json"}
    work = tmp_path / "shared" / "work"
    with running_hub(tmp_path / "hub", options=StagingOptions(user="acme")) as endpoint:
        api = HfApi(endpoint=endpoint, token="hf_x")
        environment = {"REAL": "1", "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_x"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        shared = f'[fleet]\nshared = "{work.parent}"\nsplit = "1kB"\n'
        fleet = cluster(extra=shared, environment=environment)
        workers = {name: fleet.worker(name) for name in ("w0", "w1")}
        _joined(fleet, workers)
        pieces, began = _made_by(fleet, api, source, "acme/two", work)
        assert _proved(work, "two-bf16") >= expected.items()
        assert sorted(began) == sorted(pieces)
        workers |= {name: fleet.worker(name) for name in ("w2", "w3")}
        _joined(fleet, workers)
        pieces, began = _made_by(fleet, api, source, "acme/four", work, workers)
        assert _proved(work, "four-bf16") >= expected.items()
        assert began.count("piece 1-of-8") > 1, began
        assert set(pieces) == {f"piece {number}-of-8" for number in range(1, 9)}
    assert [path.name for path in work.iterdir()] == ["story.jsonl"]
    for repo in ("acme/two", "acme/four"):
        helped = [name for name in workers if f"{repo}@" in fleet.said(name)]
        assert len(helped) > 1, helped


def _joined(fleet, workers):
    wait_for(lambda: all("joined the fleet" in fleet.said(name) for name in workers))


def _proved(work, name):
    """The files of an output when it was whole."""
    return hashes(work.parent / "proved" / "night" / name).items()


def _made_by(fleet, api, source, repo, work, victims=None):
    """Convert a release; the pieces that were finished, and those that were begun.

    One of the ``victims`` is killed in the middle of the first piece, which waits for that.
    """
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=source)
    commit = api.model_info(repo).sha
    Catalogue(ledger(fleet.url)).enqueue(
        seen(repo, commit), wanted(repo, "bf16", policy=Policy(twin=False))
    )
    if victims is not None:
        (work.parent / "slowly").touch()
    run = fleet.run()
    if victims is not None:
        mark = f"{repo}@{commit[:8]}: convert piece 1 of 8"
        wait_for(lambda: any(mark in fleet.said(name) for name in victims))
        wait_for(lambda: not (work.parent / "slowly").exists())
        victims[next(name for name in victims if mark in fleet.said(name))].kill()
    ends(run, fleet)
    entry = jobs(fleet)[f"{repo[5:]}-bf16"]
    assert entry.state == "published", fleet.said("run")
    told = [(one, what) for _, one, what, of, _ in story(work) if of == repo and one != "convert"]
    told = [(one, what) for one, what in told if one.startswith("piece")]
    return [o for o, what in told if what == "end"], [o for o, what in told if what == "begin"]


def test_tags_and_resources():
    assert {"linux", "darwin"} & measured()
    assert with_own(["m3-ultra"]) == measured() | {"m3-ultra"}
    with pytest.raises(UsageError, match="--tag M3 Ultra"):
        with_own(["M3 Ultra"])
    worker = offered(memory=100, disk=50, tags={"metal"})
    assert fits(asked(memory=100, disk=50, tag="metal"), worker)
    assert not fits(asked(memory=101, disk=50, tag=None), worker)
    assert not fits(asked(memory=1, disk=1, tag="linux"), worker)


@pytest.mark.parametrize(
    ("address", "files"),
    [("host:8786", {}), ("tcp://host", {}), ("tls://h:1", {}), ("tcp://h:1", {"cert": "c"})],
)
def test_addresses(address, files):
    with pytest.raises(UsageError, match=address):
        Scheduler.of(address, **{"ca_file": None, "cert": None, "key": None} | files)


def test_certificates_go_to_dask():
    scheduler = Scheduler.of("tls://h:1", ca_file="ca", cert="c", key="k")
    security = scheduler.security()
    assert security.require_encryption
    assert security.tls_ca_file == "ca"
    assert (security.tls_worker_cert, security.tls_client_cert) == ("c", "c")
    assert (security.tls_worker_key, security.tls_client_key) == ("k", "k")
    assert Scheduler.of("tcp://h:1", ca_file=None, cert=None, key=None).security() is None


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["run", "--tls-cert", "c"], "go with --scheduler"),
        (["run", "--scheduler", "head"], "head: give a scheduler as tcp://HOST:PORT"),
        (["worker", "tls://head:1"], "tls://head:1: tls:// goes with --tls-ca-file"),
        (["worker", "tcp://head:1", "--tag", "M3 Ultra"], "--tag M3 Ultra"),
    ],
)
def test_the_command_line_says_what_is_wrong(tmp_path, capsys, command, text):
    watchlist = tmp_path / "watch.toml"
    watchlist.write_text(WATCHLIST)
    verb, *rest = command
    at = 1 if verb == "worker" else 0
    told = [*rest[:at], watchlist, *rest[at:], "--state", tmp_path / "state"]
    assert status("batch", verb, *told) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
