"""A Dask fleet: processes are killed, and everything is done once all the same."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from batch_helpers import add, close_ledgers, ledger, seen, story, used, wait_for, wanted, watch
from fleet_helpers import Cluster
from release_helpers import LLAMA, hashes, make, status, write_release
from sqlalchemy import event, update

from converter.batch import fleet as fleet_module
from converter.batch.catalogue import Catalogue
from converter.batch.dask import Scheduler, asked, fits, is_ours, offered, tags_of
from converter.batch.fleet import Fleet, _Given
from converter.batch.fleet_worker import work_on
from converter.batch.pieces import Pieces
from converter.batch.recipes import Policy
from converter.batch.schema import job
from converter.batch.tags import measured, with_own
from converter.errors import ConvertError, UsageError
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
    fleet.plain_worker("stranger")
    workers = {name: fleet.worker(name) for name in ("w1", "w2")}
    runs = [fleet.run("run"), fleet.run("other")]  # two runs with one fleet do one job once
    wait_for(lambda: begun(fleet, "convert", "w1", "w2").count("acme/once-convert-600"))
    stuck = "w1" if "acme/once-convert-600" in begun(fleet, "convert", "w1") else "w2"
    left = "w2" if stuck == "w1" else "w1"
    workers[stuck].kill()
    fleet.scheduler.kill()
    fleet.scheduler.wait()
    fleet.scheduler = fleet.start_scheduler()
    for process, name in zip(runs, ("run", "other"), strict=True):
        ends(process, fleet, name)
    found = jobs(fleet)
    assert {entry.state for entry in found.values()} == {"published"}, fleet.said("run")
    assert found["once-convert-600-bf16"].job.lost == 1
    published = begun(fleet, "publish", "w1", "w2")
    twice = published.count("acme/slow-publish-1") - 2  # killed before it could say so
    assert twice in ((0, 1) if "acme/slow-publish-1" in begun(fleet, "publish", stuck) else (0,))
    assert len(published) == len(found) + twice
    assert "the scheduler is away; what is in hand goes on" in fleet.said(left)
    assert "1 workers are not of `convert batch worker`" in fleet.said("run")
    assert "Traceback" not in fleet.said(left) + fleet.said("run") + fleet.said("other")
    workers[left].terminate()
    assert workers[left].wait(LIMIT_S) == 143
    assert [path.name for path in (fleet.root / left / "work").iterdir()] == ["story.jsonl"]


class Handed(Fleet):
    """A fleet that only notes what it would hand out."""

    def _submit(self, key, repo, commit, wanted):
        self._given[key] = _Given(SimpleNamespace(status="pending"), wanted)


@pytest.fixture
def handed(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_module, "UNFIT_S", 0.0)
    mine = ledger(f"sqlite:///{tmp_path / 'ledger.db'}", gated_wait=1000)
    scheduler = Scheduler.of("tcp://h:1", ca_file=None, cert=None, key=None)
    yield Handed(mine, scheduler, shared=False, say=lambda line: None)
    close_ledgers()


def hand_out(fleet, *workers):
    """What is asked for each release that is handed out when there are these workers."""
    known = {str(number): offered(**worker) for number, worker in enumerate(workers)}
    fleet.ledger.tags = frozenset(tag for one in known.values() for tag in tags_of(one))
    fleet._given.clear()
    fleet._hand_out(known)
    repos = {e.release.id: e.release.repo for e in fleet.catalogue.entries()}
    return {repos[number]: given.wanted for (_, number), given in fleet._given.items()}


SMALL = {"memory": 3 * 10**9, "disk": 10**9, "tags": ["linux"]}
APPLE = {"memory": 2 * 10**9, "disk": 10**9, "tags": ["metal"]}


def test_a_release_goes_to_a_worker_that_has_what_it_needs(handed):
    policy = Policy(accept="metal")
    add(handed.catalogue, "acme/model", "bf16", policy=policy)
    estimate = {"memory": 2500 + 1e9, "disk": 4000.0}
    assert hand_out(handed) == {}
    # Who has no Metal hands it over, and says so in the ledger.
    assert hand_out(handed, SMALL) == {"acme/model": estimate}
    assert hand_out(handed, SMALL, APPLE) == {"acme/model": estimate | {"tag:metal": 1.0}}
    claim = handed.ledger.claim()
    handed.ledger.hand_over(claim, claim.tasks[0].id, "metal")
    handed.ledger.give_back(claim)
    assert hand_out(handed, SMALL) == {}
    assert hand_out(handed, SMALL, APPLE) == {"acme/model": estimate | {"tag:metal": 1.0}}


def test_a_release_that_no_worker_is_large_enough_for_waits(handed):
    large = replace(seen("acme/large"), weight_bytes=10**9)
    handed.catalogue.enqueue(large, wanted("acme/large"))
    # An estimate is no reason: somebody plans it, and then it is known.
    assert hand_out(handed, SMALL) == {"acme/large": {"memory": 0.0, "disk": 0.0}}
    claim = handed.ledger.claim()
    facts = {"needs": {"disk": 10**8, "memory": 5 * 10**9}}
    handed.ledger.passed(claim, claim.tasks[0].id, "examine", used(), facts=facts)
    handed.ledger.give_back(claim)
    assert hand_out(handed, SMALL, SMALL | {"memory": 6 * 10**9}) == {
        "acme/large": {"memory": 5e9, "disk": 1e8}
    }
    assert hand_out(handed, SMALL) == {}
    (entry,) = handed.catalogue.entries()
    assert (entry.state, entry.job.error_class) == ("waiting", "resources")
    assert entry.job.error == (
        "acme/large: needs 5.0 GB of memory where the largest worker has 3.0 GB"
    )


def planned(catalogue, repo, *variants, memory, kind="convert"):
    """A release whose plans need so much memory; its jobs are of a kind."""
    add(catalogue, repo, *variants)
    mine = catalogue.ledger
    claim = mine.claim(only=max(e.release.id for e in catalogue.entries()))
    for task in claim.tasks:
        facts = {"needs": {"disk": 10, "memory": memory, "convert": 10}}
        mine.passed(claim, task.id, "examine", used(), facts=facts)
    mine.give_back(claim)
    return claim


class Client:
    """Dask's client, as far as it is asked about workers."""

    status = "running"

    def __init__(self, **workers):
        self.workers = {name: {"resources": found} for name, found in workers.items()}

    def scheduler_info(self, n_workers):
        return {"workers": self.workers}


def test_what_waits_for_a_worker_that_left_is_judged_anew(handed, monkeypatch):
    monkeypatch.setattr(fleet_module, "UNFIT_S", 0.05)
    claim = planned(handed.catalogue, "acme/large", memory=5 * 10**9)
    large = offered(**SMALL | {"memory": 6 * 10**9})
    handed._hand_out({"w0": large})
    (given,) = handed._given.values()
    released = []
    given.future.release = lambda: released.append(1)
    handed._collect({"w0": large})
    assert list(handed._given) == [("release", claim.release)]
    others = {"w1": offered(**SMALL)}
    handed._collect(others)
    assert (handed._given, released) == ({}, [1])
    handed._hand_out(others)  # it may be back soon, as after a restart of the scheduler
    assert handed.catalogue.entries()[0].state == "queued"
    wait_for(lambda: handed._hand_out(others) or handed.catalogue.entries()[0].state == "waiting")
    assert "where the largest worker has 3.0 GB" in handed.catalogue.entries()[0].job.error


def test_an_answer_that_its_worker_took_along_is_not_waited_for(handed):
    def result(timeout=None):
        raise TimeoutError if timeout is not None else AssertionError("waits for ever")

    future = SimpleNamespace(status="finished", result=result, release=lambda: None)
    handed._given["release", 1] = _Given(future, {})
    handed._collect({})
    assert handed._given == {}
    assert handed._resting(("release", 1))  # and handed out again, if it still is due


def test_a_worker_that_is_not_ours_is_handed_nothing(handed):
    said = []
    handed.say = said.append
    planned(handed.catalogue, "acme/large", memory=5 * 10**9)
    handed._client = Client(plain={}, other={"GPU": 2}, ours=offered(**SMALL))
    for _ in range(2):
        assert list(handed._workers()) == ["ours"]
    assert said == ["tcp://h:1: 2 workers are not of `convert batch worker` and are handed nothing"]
    assert not is_ours({"memory": 1.0})
    handed._client = Client(plain={})
    assert handed._turn()
    assert handed._given == {}
    assert handed.catalogue.entries()[0].state == "queued"


def test_a_tag_that_was_there_a_moment_ago_is_waited_for(handed, monkeypatch):
    monkeypatch.setattr(fleet_module, "UNFIT_S", 1000.0)
    add(handed.catalogue, "acme/model", policy=Policy(accept="metal"))
    claim = handed.ledger.claim()
    handed.ledger.hand_over(claim, claim.tasks[0].id, "metal")
    handed.ledger.give_back(claim)
    handed._client = Client(apple=offered(**APPLE))
    assert handed._turn()
    assert list(handed._given) == [("release", claim.release)]
    handed._given.clear()
    handed._client = Client(small=offered(**SMALL))  # who can do nothing about it is not asked
    assert handed._turn()
    assert handed._given == {}
    handed._client = Client()  # as when the scheduler was started again
    assert handed._turn()
    monkeypatch.setattr(fleet_module, "UNFIT_S", 0.0)
    assert not handed._turn()


def test_a_fleet_without_workers_is_said(handed):
    add(handed.catalogue, "acme/model")
    handed._client = Client()
    assert handed._turn()
    handed._manned_at -= handed.ledger.retries.patience
    with pytest.raises(ConvertError, match="h:1: has had no worker; start one with"):
        handed._turn()
    claim = ledger(f"{handed.ledger.database.engine.url}").claim()  # one that lost the scheduler
    handed._jobs = {claim.tasks[0].id}
    assert handed._turn()


def test_what_needs_nothing_goes_on_beside_what_is_too_large(handed):
    claim = planned(handed.catalogue, "acme/large", "bf16", "4bit", memory=5 * 10**9)
    card, _ = (task.id for task in claim.tasks)
    change = update(job).where(job.c.id == card).values(kind="card", facts={})
    handed.ledger.database.do(lambda connection: connection.execute(change))
    assert hand_out(handed, SMALL) == {}
    assert [e.job.state for e in handed.catalogue.entries()] == ["queued", "waiting"]
    assert hand_out(handed, SMALL) == {"acme/large": {"memory": 0.0, "disk": 0.0}}


def test_a_piece_goes_to_a_worker_that_has_its_memory(handed):
    add(handed.catalogue, "acme/model")
    other = ledger(f"{handed.ledger.database.engine.url}")
    claim = other.claim()
    Pieces(other).cut(claim, [claim.tasks[0].id], 2, memory=4 * 10**9)
    assert hand_out(handed, SMALL) == {}
    handed._hand_out({"w0": offered(**SMALL | {"memory": 6 * 10**9})})
    assert [kind for kind, _ in handed._given] == ["piece", "piece"]
    assert {given.wanted["memory"] for given in handed._given.values()} == {4e9}


def test_handing_out_asks_the_ledger_a_few_times_however_much_is_due(handed):
    for number in range(30):
        add(handed.catalogue, f"acme/m{number}", "bf16", "4bit")
    asked_for = []
    engine = handed.ledger.database.engine
    event.listen(engine, "before_cursor_execute", lambda *given: asked_for.append(given[2]))
    assert len(hand_out(handed, SMALL)) == 30
    assert len([text for text in asked_for if text.startswith("SELECT")]) < 10


def test_a_task_names_its_release_and_nothing_else(handed):
    calls = []
    handed._client = SimpleNamespace(submit=lambda *given, **named: calls.append((given, named)))
    Fleet._submit(handed, ("release", 7), "acme/model", "c1", {"memory": 1.0})
    ((given, named),) = calls
    assert given == (work_on, "release", 7, "acme/model", "c1")
    assert named.pop("key").startswith("release-7-")
    assert named == {"pure": False, "resources": {"memory": 1.0}}


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
        count = sum(name.endswith(".safetensors") for name in expected)
        assert began.count(f"piece 1-of-{count}") > 1, began
        assert set(pieces) == {f"piece {number}-of-{count}" for number in range(1, count + 1)}
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
        mark = f"{repo}@{commit[:8]}: convert piece 1 of "
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
    odd = offered(memory=100, disk=50, tags={"memory", "disk"})  # are names as good as any
    assert fits(asked(memory=100, disk=50, tag="memory"), odd)
    assert not fits(asked(memory=101, disk=50, tag="disk"), odd)
    assert not fits(asked(memory=0, disk=0, tag=None), {})
    assert tags_of(odd) == {"memory", "disk"}


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
    watch(tmp_path)
    watchlist = tmp_path / "watch.toml"
    verb, *rest = command
    at = 1 if verb == "worker" else 0
    told = [*rest[:at], watchlist, *rest[at:], "--state", tmp_path / "state"]
    assert status("batch", verb, *told) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
