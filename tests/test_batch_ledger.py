"""The ledger on SQLite and PostgreSQL: claims, leases, failures, and what people ask of it."""

import multiprocessing
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from batch_helpers import (
    add,
    claims_of,
    close_ledgers,
    ledger,
    seen,
    start_forkserver,
    used,
    wanted,
)
from sqlalchemy import select, text, update

from benchmarks.postgres import running_postgres
from converter.batch import ledger as ledger_module
from converter.batch.catalogue import Catalogue, choose
from converter.batch.claims import LeaseLostError
from converter.batch.database import Database
from converter.batch.failures import Failure, classify, verdict
from converter.batch.ledger import Ledger
from converter.batch.pieces import Pieces
from converter.batch.recipes import Policy
from converter.batch.schema import attempt, job, migrate, release, version_table
from converter.batch.watchlist import Retries
from converter.errors import ConvertError, GateError, HubError, PlanError, UsageError
from converter.execute.folder import BusyError


@pytest.fixture(autouse=True)
def _closed():
    yield
    close_ledgers()


@pytest.fixture(scope="session")
def postgres():
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return request.getfixturevalue("postgres").database().replace(":", "+psycopg:", 1)


@pytest.fixture
def mine(tmp_path):
    return ledger(f"sqlite:///{tmp_path / 'ledger.db'}", first_wait=0.01)


@pytest.fixture
def catalogue(mine):
    return Catalogue(mine)


def states(catalogue):
    return {entry.job.target.split("/")[1]: entry.state for entry in catalogue.entries()}


def test_each_release_is_claimed_once_by_many_processes(url):
    context = multiprocessing.get_context("forkserver")
    start_forkserver()
    catalogue = Catalogue(ledger(url))
    for number in range(30):
        add(catalogue, f"acme/m{number}", "bf16", "4bit")
    results = context.Queue()
    workers = [context.Process(target=claims_of, args=(url, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    taken = [results.get(timeout=180) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(one for some in taken for one in some) == list(range(1, 31))


def test_a_claim_brings_all_variants_and_keeps_others_out(url):
    first, second = ledger(url), ledger(url)
    add(Catalogue(first), "acme/model", "bf16", "4bit")
    claim = first.claim()
    assert claim is not None
    assert [task.variant for task in claim.tasks] == ["bf16", "4bit"]
    assert second.claim() is None
    assert first.claim([claim.release]) is None
    assert first.heartbeat([claim]) == set()
    first.give_back(claim)
    assert second.claim() is not None


def test_a_lease_that_ran_out_passes_on_and_fences_its_old_owner(url):
    slow, other = ledger(url), ledger(url)
    catalogue = Catalogue(slow)
    add(catalogue)
    old = slow.claim()
    assert old is not None
    slow.entered(old, [old.tasks[0].id], "convert")
    assert other.claim() is None
    assert other.expire("nobody") == 0
    assert other.expire(slow.owner[:-1]) == 1  # as if its time were over
    new = other.claim()
    assert new is not None
    assert new.fence == old.fence + 1
    assert slow.heartbeat([old]) == {old.release}
    with pytest.raises(LeaseLostError):
        slow.passed(old, old.tasks[0].id, "convert", used())
    with pytest.raises(LeaseLostError):
        slow.failed(old, old.tasks[0].id, "convert", used(), Failure("hub", "x"))
    slow.give_back(old)  # changes nothing
    (entry,) = catalogue.entries()
    assert entry.running
    assert (entry.job.lost, entry.job.error_class) == (1, "lost")
    assert entry.job.error.startswith("the worker on ")
    assert entry.job.error.endswith(" vanished in stage convert")
    other.passed(new, new.tasks[0].id, "publish", used(), published=True)
    assert states(catalogue) == {"model-bf16": "published"}


def test_a_job_that_takes_its_workers_along_is_parked(tmp_path):
    mine = ledger(f"sqlite:///{tmp_path / 'ledger.db'}", lease=0.01)
    catalogue = Catalogue(mine)
    add(catalogue)
    for stage in ("", *["convert"] * 6):
        worker = ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
        claim = worker.claim()
        if claim is not None and stage:  # one that only waited in a worker's hands is no suspect
            worker.entered(claim, [1], stage)
        worker.expire(worker.owner)
    (entry,) = catalogue.entries()
    assert (entry.job.state, entry.job.error_class, entry.job.lost) == ("parked", "lost", 5)
    assert "(5 times)" in entry.job.error


def test_a_database_that_restarts_is_waited_for(postgres):
    mine = ledger(postgres.database().replace(":", "+psycopg:", 1))
    add(Catalogue(mine))
    postgres.stop()
    threading.Timer(0.5, postgres.start).start()
    assert mine.claim() is not None


def test_a_database_that_stays_away_is_said(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}", patience=0)
    database.engine.dispose()
    (tmp_path / "ledger.db").unlink()
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(ConvertError, match="the ledger failed: unable to open database"):
        database.do(lambda connection: None)


def test_a_newer_ledger_is_left_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    database = Database(url)
    database.do(lambda c: c.execute(update(version_table).values(version=99)))
    with pytest.raises(UsageError, match="schema version 99 and this program knows 2"):
        Database(url)
    database.do(lambda c: c.execute(update(version_table).values(version=2)))
    Database(url).do(lambda c: migrate(c, (lambda _: pytest.fail("run twice"),) * 2))


def test_an_older_ledger_is_brought_up_step_by_step(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    done = []
    steps = tuple(lambda c, number=number: done.append(number) for number in (1, 2, 3, 4))
    database.do(lambda c: migrate(c, steps))
    assert done == [3, 4]
    assert database.do(lambda c: c.scalar(select(version_table.c.version))) == 4


def test_a_ledger_of_the_first_version_keeps_its_jobs(url):
    add(Catalogue(ledger(url)))
    database = ledger(url).database
    for statement in ("DROP TABLE piece", "ALTER TABLE job DROP COLUMN needs"):
        database.do(lambda c, statement=statement: c.execute(text(statement)))
    database.do(lambda c: c.execute(update(version_table).values(version=1)))
    mine = ledger(url)
    (task,) = mine.claim().tasks
    assert (task.target, task.needs) == ("night/model-bf16", None)
    assert Pieces(mine).open() == []


def test_a_job_that_needs_a_tag_is_left_to_those_who_have_it(url):
    catalogue = Catalogue(ledger(url))
    add(catalogue, "acme/model", "bf16", "4bit")
    plain = ledger(url, lease=60, gated_wait=1000)
    claim = plain.claim()
    said = plain.hand_over(claim, claim.tasks[0].id, "metal")
    assert said.startswith("waits for a worker tagged metal")
    plain.give_back(claim)
    assert [task.variant for task in plain.claim().tasks] == ["4bit"]
    assert plain.next_due() is None
    apple = Ledger(plain.database, retries=plain.retries, tags={"metal", "darwin"})
    assert [due.repo for due in apple.due()] == []  # the release is in other hands
    plain.expire(plain.owner)
    assert [task.variant for due in apple.due() for task in due.tasks] == ["bf16", "4bit"]
    claim = apple.claim()
    assert [(task.variant, task.needs) for task in claim.tasks] == [
        ("bf16", "metal"),
        ("4bit", None),
    ]
    apple.passed(claim, claim.tasks[0].id, "publish", used(), published=True)
    (entry, _) = catalogue.entries()
    assert (entry.state, entry.job.needs, entry.job.error) == ("published", None, None)


def test_each_piece_is_claimed_once_by_workers_that_hurry(url):
    add(Catalogue(ledger(url)))
    mine = ledger(url, lease=60)
    claim = mine.claim()
    Pieces(mine).cut(claim, [task.id for task in claim.tasks], 40)
    workers = [Pieces(ledger(url, lease=60)) for _ in range(4)]
    together = threading.Barrier(len(workers))

    def take(pieces):
        together.wait()
        return [one.number for one in iter(pieces.claim, None)]

    with ThreadPoolExecutor(len(workers)) as pool:
        taken = list(pool.map(take, workers))
    assert sorted(number for some in taken for number in some) == list(range(1, 41))


def test_pieces_are_claimed_once_each_and_only_while_their_release_is_held(url):
    add(Catalogue(ledger(url)), "acme/model", "bf16", "4bit")
    mine, other = ledger(url, lease=60), ledger(url, lease=60)
    claim = mine.claim()
    pieces, theirs = Pieces(mine), Pieces(other)
    jobs = [task.id for task in claim.tasks]
    pieces.cut(claim, jobs, 3)
    first, second = pieces.claim(), theirs.claim()
    assert [(p.number, p.count, p.repo) for p in (first, second)] == [
        (1, 3, "acme/model"),
        (2, 3, "acme/model"),
    ]
    assert [task.variant for task in second.tasks] == ["bf16", "4bit"]
    assert theirs.claim(only=first.id) is None
    assert theirs.claim(of=[claim.release + 1]) is None
    theirs.settle(first, "done")  # is not theirs to say
    pieces.settle(first, "done")
    theirs.settle(second, "failed")
    assert pieces.left(claim) == 1
    pieces.cut(claim, jobs, 3)  # the same again: what is done stays done, what failed is open
    assert pieces.left(claim) == 2
    third = theirs.claim()
    theirs.expire(other.owner)
    assert pieces.heartbeat([third]) == {third.id}
    taken = pieces.claim(only=third.id)
    assert (taken.number, taken.fence) == (third.number, third.fence + 1)
    assert theirs.heartbeat([third]) == {third.id}
    assert pieces.heartbeat([taken]) == set()
    mine.give_back(claim)
    assert theirs.open() == []
    with pytest.raises(LeaseLostError):
        pieces.cut(claim, jobs, 5)
    claim = other.claim()
    theirs.cut(claim, jobs, 2)
    assert (theirs.left(claim), len(theirs.open())) == (2, 2)
    theirs.clear(claim)
    assert theirs.left(claim) == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x/y", "mysql is neither sqlite nor postgresql"),
        ("no url", "not an SQLAlchemy URL"),
    ],
)
def test_a_ledger_that_cannot_be_is_refused(url, message):
    with pytest.raises(UsageError, match=message):
        Database(url)


RETRIES = Retries(first_wait=10, longest_wait=45, gated_wait=1000)


@pytest.mark.parametrize(
    ("kind", "attempts", "crashes", "state", "wait"),
    [
        ("hub", 1, 0, "queued", 10),
        ("hub", 2, 0, "queued", 20),
        ("hub", 4, 0, "queued", 45),
        ("hub", 5, 0, "parked", 0),
        ("disk", 4, 0, "queued", 45),
        ("refused", 2, 0, "queued", 20),
        ("refused", 3, 0, "parked", 0),
        ("unsupported", 1, 0, "parked", 0),
        ("gate", 1, 0, "parked", 0),
        ("usage", 1, 0, "parked", 0),
        ("failed", 1, 0, "parked", 0),
        ("gated", 9, 0, "waiting", 1000),
        ("resources", 9, 0, "waiting", 1000),
        ("crash", 1, 1, "queued", 10),
        ("crash", 1, 2, "quarantined", 0),
        ("internal", 1, 2, "quarantined", 0),
    ],
)
def test_what_a_failure_means(kind, attempts, crashes, state, wait):
    found = verdict(kind, attempts=attempts, crashes=crashes, lost=0, retries=RETRIES)
    assert (found.state, found.wait) == (state, wait)


def hub_error(status: int | None, gated: bool = False) -> HubError:
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    error = HubError("said")
    if status is not None:
        response = httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))
        error.__cause__ = (GatedRepoError if gated else HfHubHTTPError)("x", response=response)
    return error


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PlanError(["x"]), "unsupported"),
        (GateError("x"), "gate"),
        (UsageError("x"), "usage"),
        (BusyError("another process is at it"), "disk"),
        (ConvertError("x"), "failed"),
        (caused(ConvertError("x"), OSError(28, "full")), "disk"),
        (OSError(5, "failing"), "disk"),
        (hub_error(None), "hub"),
        (hub_error(503), "hub"),
        (hub_error(409), "hub"),
        (hub_error(429), "hub"),
        (hub_error(404), "refused"),
        (hub_error(403), "refused"),
        (hub_error(403, gated=True), "gated"),
        (caused(HubError("x"), OSError(28, "full")), "disk"),
        (MemoryError(), "crash"),
        (KeyError("x"), "internal"),
    ],
    ids=repr,
)
def test_classes_of_failures(error, kind):
    assert classify(error).kind == kind


def test_failures_hide_tokens():
    assert "abcdefgh" not in classify(RuntimeError("token hf_abcdefghijkl")).text


def test_failures_of_a_stage_add_up_until_it_goes_well(mine, catalogue):
    add(catalogue)
    for count in (1, 2, 3, 4):
        time.sleep(0.02)
        claim = mine.claim()
        assert claim is not None
        failed = mine.failed(claim, 1, "fetch", used(), Failure("hub", "HTTP 503"))
        assert failed == "queued"
        assert catalogue.entries()[0].job.attempts == {"fetch": count}
        mine.give_back(claim)
        time.sleep(0.01 * 2**count)
    claim = mine.claim()
    mine.passed(claim, 1, "fetch", used(peak_memory=5, bytes=7), facts={"plan": "p"})
    mine.passed(claim, 1, "fetch", used(peak_memory=3))
    (entry,) = catalogue.entries()
    assert entry.job.attempts == {}
    assert entry.job.facts == {"plan": "p"}
    assert entry.job.peak_memory == 5
    rows = catalogue.attempts()
    assert [row.outcome for row in rows] == ["hub"] * 4 + ["ok"] * 2
    assert (rows[4].bytes, rows[4].number) == (7, 5)


def test_a_commit_whose_answer_was_lost_is_recorded_once(mine, catalogue):
    add(catalogue)
    claim = mine.claim()
    once = used()
    mine.passed(claim, 1, "fetch", once)
    mine.passed(claim, 1, "fetch", once)
    assert len(catalogue.attempts()) == 1
    again = mine.claim()  # the answer to the claim was lost: it is not in hand
    assert again is not None
    assert catalogue.entries()[0].job.lost == 0


def test_enqueue_is_idempotent(catalogue):
    assert add(catalogue, "acme/model", "bf16", "4bit") == 2
    assert add(catalogue, "acme/model", "bf16", "4bit") == 0
    assert len(catalogue.entries()) == 2


def test_two_releases_of_one_name_do_not_share_a_repo(catalogue):
    add(catalogue, "acme/model")
    add(catalogue, "other/model")
    second = catalogue.entries()[1].job
    assert (second.state, second.error_class) == ("parked", "usage")
    assert second.error.startswith("night/model-bf16 is made from acme/model already")


def publish(mine, catalogue):
    claim = mine.claim()
    for task in claim.tasks:
        mine.passed(claim, task.id, "publish", used(), published=True)
    mine.give_back(claim)


def test_a_new_commit_replaces_what_was_not_finished(mine, catalogue):
    add(catalogue, commit="c1")
    add(catalogue, commit="c2", content="other", modified=2.0)
    assert [e.release.commit for e in catalogue.entries()] == ["c2"]
    assert len(catalogue.entries(superseded=True)) == 2
    claim = mine.claim()
    assert (claim.commit, claim.tasks[0].kind) == ("c2", "convert")


def test_a_commit_without_new_weights_renews_the_card_only(mine, catalogue):
    add(catalogue, commit="c1")
    publish(mine, catalogue)
    add(catalogue, commit="c2", modified=2.0)
    add(catalogue, commit="c3", content="new weights", modified=3.0)
    kinds = {e.release.commit: (e.job.kind, e.job.state) for e in catalogue.entries()}
    assert kinds == {"c1": ("convert", "published"), "c3": ("convert", "queued")}
    add(catalogue, commit="c4", modified=4.0)
    assert mine.claim().tasks[0].kind == "card"


def test_an_older_commit_is_uploaded_before_a_newer_one_is_begun(mine, tmp_path):
    catalogue = Catalogue(mine)
    add(catalogue, commit="c1")
    old = mine.claim()
    add(catalogue, commit="c2", content="other", modified=2.0)
    other = ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    assert other.claim() is None
    mine.give_back(old)
    assert other.claim().commit == "c2"


def test_gates_that_change_give_a_parked_job_another_chance(mine, catalogue):
    strict, loose = Policy(kl_threshold=0.1), Policy(kl_threshold=0.5)
    catalogue.enqueue(seen(), wanted(policy=strict))
    claim = mine.claim()
    assert mine.failed(claim, 1, "prove", used(), Failure("gate", "KL 0.2")) == "parked"
    mine.give_back(claim)
    catalogue.enqueue(seen(), wanted(policy=strict))
    assert catalogue.entries()[0].job.state == "parked"
    catalogue.enqueue(seen(), wanted(policy=loose))
    (entry,) = catalogue.entries()
    assert (entry.job.state, entry.job.error) == ("queued", None)
    assert entry.job.policy["kl_threshold"] == 0.5


def test_permanent_failures_wait_for_other_tools(mine, catalogue, monkeypatch, tmp_path):
    add(catalogue, "acme/bad")
    add(catalogue, "acme/good")
    add(catalogue, "acme/held")
    for kind in (Failure("unsupported", "no map"), None, None):
        claim = mine.claim()
        if kind is None:
            mine.passed(claim, claim.tasks[0].id, "publish", used(), published=True)
        else:
            mine.failed(claim, claim.tasks[0].id, "examine", used(), kind)
        mine.give_back(claim)
        if claim.repo == "acme/good":
            break
    catalogue.park(choose(catalogue.entries(), ["acme/held"]), "not now")
    assert catalogue.renew() == 0
    monkeypatch.setattr(ledger_module, "tool_versions", lambda: {"mlx": "99"})
    newer = ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    assert Catalogue(newer).renew() == 1
    assert states(catalogue) == {
        "bad-bf16": "queued",
        "good-bf16": "published",
        "held-bf16": "parked",
    }
    assert mine.claim() is None  # is for the newer tools
    claim = newer.claim()
    assert claim.repo == "acme/bad"
    assert Catalogue(newer).renew() == 0


def test_people_choose_retry_park_and_forget(mine, catalogue):
    add(catalogue, "acme/one", "bf16", "4bit")
    add(catalogue, "beta/two")
    entries = catalogue.entries()
    assert [e.job.id for e in choose(entries, ["acme/*"])] == [1, 2]
    assert [e.job.id for e in choose(entries, ["night/*-4bit"])] == [2]
    assert [e.job.id for e in choose(entries, ["beta/two@c1", "1"])] == [1, 3]
    catalogue.park(choose(entries, ["acme/*"]), "later")
    assert mine.claim().repo == "beta/two"
    catalogue.retry(choose(catalogue.entries(), ["2"]))
    assert [t.variant for t in mine.claim([2]).tasks] == ["4bit"]
    catalogue.set_watermark("list", "acme", 5.0)
    catalogue.forget(choose(catalogue.entries(), ["acme/*"]))
    assert [e.release.repo for e in catalogue.entries()] == ["beta/two"]
    assert catalogue.watermark("list", "acme") is None
    assert mine.database.do(lambda c: c.execute(select(release))).all()[0].repo == "beta/two"
    assert catalogue.attempts() == []


def test_watermarks_only_rise(catalogue):
    assert catalogue.watermark("list", "acme") is None
    for modified in (5.0, 9.0, 7.0):
        catalogue.set_watermark("list", "acme", modified)
    assert catalogue.watermark("list", "acme") == 9.0
    assert catalogue.watermark("list", "other") is None


def test_a_busy_sqlite_is_waited_for(mine, catalogue, tmp_path):
    add(catalogue)
    blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, blocker.execute, ["ROLLBACK"]).start()
    assert mine.claim() is not None
    blocker.close()


def test_tables_have_what_the_report_needs():
    assert {"peak_memory", "bytes", "host", "outcome", "stage"} <= set(attempt.c.keys())
    assert {"recipe_hash", "tools", "attempts", "facts"} <= set(job.c.keys())
