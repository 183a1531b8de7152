"""The ledger on SQLite and PostgreSQL: claims, leases, failures, and what people ask of it."""

import multiprocessing
import sqlite3
import threading
import time
from dataclasses import replace

import pytest
from batch_helpers import (
    RECIPES,
    add,
    claims_of,
    ledger,
    seen,
    start_forkserver,
    used,
    wanted,
)
from sqlalchemy import select, text, update

from converter.batch import ledger as ledger_module
from converter.batch.catalogue import Catalogue, Wanted, choose
from converter.batch.claims import LeaseLostError
from converter.batch.database import Database
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger
from converter.batch.pieces import Pieces
from converter.batch.recipes import Policy
from converter.batch.schema import attempt, job, migrate, release, version_table
from converter.errors import ConvertError, UsageError

pytestmark = pytest.mark.usefixtures("closed_ledgers")


@pytest.fixture
def mine(tmp_path):
    return ledger(f"sqlite:///{tmp_path / 'ledger.db'}", first_wait=0.01)


@pytest.fixture
def catalogue(mine):
    return Catalogue(mine)


def states(catalogue):
    return {entry.job.target.split("/")[1]: entry.state for entry in catalogue.entries()}


def test_each_release_is_claimed_once_by_many_processes(ledger_url):
    context = multiprocessing.get_context("forkserver")
    start_forkserver()
    catalogue = Catalogue(ledger(ledger_url))
    for number in range(30):
        add(catalogue, f"acme/m{number}", "bf16", "4bit")
    results = context.Queue()
    workers = [context.Process(target=claims_of, args=(ledger_url, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    taken = [results.get(timeout=180) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(one for some in taken for one in some) == list(range(1, 31))


def test_a_claim_brings_all_variants_and_keeps_others_out(ledger_url):
    first, second = ledger(ledger_url), ledger(ledger_url)
    add(Catalogue(first), "acme/model", "bf16", "4bit")
    claim = first.claim()
    assert claim is not None
    assert [task.variant for task in claim.tasks] == ["bf16", "4bit"]
    assert second.claim() is None
    assert first.claim([claim.release]) is None
    assert first.heartbeat([claim]) == set()
    first.give_back(claim)
    assert second.claim() is not None


@pytest.mark.parametrize("when", ["has taken", "is taking"])
def test_two_commits_of_a_repo_are_not_taken_at_once(postgres, monkeypatch, when):
    """Each worker sees the other's commit free, as nothing of it has been written yet."""
    url = f"{postgres.database()}&options=-clock_timeout%3D1s"  # waiting here would be for ever
    first, second = ledger(url), ledger(url)
    catalogue = Catalogue(first)
    add(catalogue, commit="c1", modified=1.0)
    add(catalogue, "acme/model", "4bit", commit="c2", modified=2.0)
    take, others = first.take, []

    def between(connection, row, free, now):
        """The second worker comes before the first has written, or before that is committed."""
        if when == "is taking":
            taken = take(connection, row, free, now)
        others.append(second.claim())
        return taken if when == "is taking" else take(connection, row, free, now)

    monkeypatch.setattr(first, "take", between)
    mine = first.claim()
    assert [claim is None for claim in (mine, *others)].count(False) == 1
    assert (others[0] is None) == (when == "is taking")
    monkeypatch.undo()
    assert first.claim([mine.release] if mine else []) is None
    second.give_back(others[0]) if mine is None else first.give_back(mine)
    assert second.claim() is not None


def test_two_that_enqueue_one_target_see_each_other(postgres):
    """Of two releases under one name the later one is parked, however close they come."""
    url = postgres.database()
    first, second = ledger(url), ledger(url)
    done = threading.Event()

    def other() -> None:
        add(Catalogue(second), "zeta/model")
        done.set()

    thread = threading.Thread(target=other)
    with first.database.engine.begin() as connection:
        Catalogue(first)._enqueue(connection, seen("acme/model"), wanted("acme/model"))
        thread.start()
        assert not done.wait(0.3)
    thread.join(60)
    states = {e.release.repo: e.state for e in Catalogue(first).entries()}
    assert states == {"acme/model": "queued", "zeta/model": "parked"}


def test_a_lease_that_ran_out_passes_on_and_fences_its_old_owner(ledger_url):
    slow, other = ledger(ledger_url), ledger(ledger_url)
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
    ledger_url = f"sqlite:///{tmp_path / 'ledger.db'}"
    database = Database(ledger_url)
    database.do(lambda c: c.execute(update(version_table).values(version=99)))
    with pytest.raises(UsageError, match="schema version 99 and this program knows 3"):
        Database(ledger_url)
    database.do(lambda c: c.execute(update(version_table).values(version=3)))
    Database(ledger_url).do(lambda c: migrate(c, (lambda _: pytest.fail("run twice"),) * 3))


def test_an_older_ledger_is_brought_up_step_by_step(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    done = []
    steps = tuple(lambda c, number=number: done.append(number) for number in (1, 2, 3, 4, 5))
    database.do(lambda c: migrate(c, steps))
    assert done == [4, 5]
    assert database.do(lambda c: c.scalar(select(version_table.c.version))) == 5


@pytest.mark.parametrize(
    ("version", "undone"),
    [
        (1, ("DROP TABLE piece", "ALTER TABLE job DROP COLUMN needs")),
        (2, ("ALTER TABLE piece DROP COLUMN memory",)),
    ],
)
def test_a_ledger_of_an_older_version_keeps_its_jobs(ledger_url, version, undone):
    add(Catalogue(ledger(ledger_url)))
    database = ledger(ledger_url).database
    for statement in undone:
        database.do(lambda c, statement=statement: c.execute(text(statement)))
    database.do(lambda c: c.execute(update(version_table).values(version=version)))
    mine = ledger(ledger_url)
    (task,) = mine.claim().tasks
    assert (task.target, task.needs) == ("night/model-bf16", None)
    assert Pieces(mine).open() == []


def test_a_job_that_needs_a_tag_is_left_to_those_who_have_it(ledger_url):
    catalogue = Catalogue(ledger(ledger_url))
    add(catalogue, "acme/model", "bf16", "4bit")
    plain = ledger(ledger_url, lease=60, gated_wait=1000)
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


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x/y", "mysql is neither sqlite nor postgresql"),
        ("no ledger_url", "not an SQLAlchemy URL"),
    ],
)
def test_a_ledger_that_cannot_be_is_refused(url, message):
    with pytest.raises(UsageError, match=message):
        Database(url)


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


def test_a_lease_that_ran_out_does_not_come_back_beside_another_commit(ledger_url):
    """Two workers would publish to one repo."""
    slow, other = ledger(ledger_url), ledger(ledger_url)
    catalogue = Catalogue(slow)
    add(catalogue, commit="c1")
    old = slow.claim()
    assert old is not None
    slow.expire(slow.owner)
    assert slow.heartbeat([old]) == set()  # nobody has come meanwhile
    add(catalogue, commit="c2", content="other", modified=2.0)
    assert other.claim() is None
    slow.expire(slow.owner)
    new = other.claim()
    assert new is not None
    assert new.commit == "c2"
    with pytest.raises(LeaseLostError):
        slow.entered(old, [old.tasks[0].id], "publish")
    assert slow.heartbeat([old]) == {old.release}
    other.entered(new, [new.tasks[0].id], "publish")
    other.give_back(new)


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


def with_drafter(target: str, *, mtp: bool = True) -> list[Wanted]:
    asked = replace(RECIPES["4bit"] if mtp else RECIPES["bf16"], mtp=mtp)
    return [Wanted(variant="own", asked=asked, target=target, policy=Policy())]


@pytest.mark.parametrize("drafter_first", [True, False])
def test_a_drafter_does_not_go_where_another_output_goes(catalogue, drafter_first):
    jobs = [
        ("acme/model", with_drafter("night/model")),
        ("acme/model-mtp", with_drafter("night/model-mtp", mtp=False)),
    ]
    for repo, wants in jobs if drafter_first else reversed(jobs):
        assert catalogue.enqueue(seen(repo), wants) == 1
    first, second = sorted(catalogue.entries(), key=lambda entry: entry.job.id)
    assert (first.state, second.state, second.job.error_class) == ("queued", "parked", "usage")
    told = f"night/model-mtp is made from {first.release.repo} already; give names with"
    assert second.job.error.startswith(told)


def test_drafter_and_output_of_one_release_do_not_share_a_repo(catalogue):
    catalogue.enqueue(seen(), with_drafter("night/d"))
    catalogue.enqueue(seen(), with_drafter("night/d-mtp", mtp=False))
    catalogue.enqueue(seen(), with_drafter("night/other", mtp=False))
    found = {entry.job.target: entry for entry in catalogue.entries()}
    assert {target: entry.state for target, entry in found.items()} == {
        "night/d": "queued",
        "night/d-mtp": "parked",
        "night/other": "queued",
    }
    assert "rename one of the two" in found["night/d-mtp"].job.error


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


def with_adapter(path: str) -> list[Wanted]:
    (one,) = wanted()
    asked = replace(one.asked, adapter={"files": {"a": "sha256"}}, adapter_path=path)
    return [replace(one, asked=asked)]


def test_a_job_without_its_adapter_waits_and_begins_anew_when_it_is_wanted_again(mine, catalogue):
    catalogue.enqueue(seen(), with_adapter("/old"))
    claim = mine.claim()
    no = Failure("adapter", "adapter_path /old: no such folder")
    assert mine.failed(claim, 1, "examine", used(), no) == "waiting"
    mine.give_back(claim)
    assert mine.claim() is None
    catalogue.enqueue(seen(), with_adapter("/old"))  # it may lie there now
    assert mine.claim() is not None
    mine.failed(claim := mine.claim(), 1, "convert", used(), Failure("disk", "is failing"))
    mine.give_back(claim)
    catalogue.enqueue(seen(), with_adapter("/new"))
    (entry,) = catalogue.entries()
    assert (entry.state, entry.job.attempts, entry.job.error) == ("queued", {}, None)
    assert entry.job.recipe["adapter_path"] == "/new"


def test_moving_an_adapter_says_nothing_about_a_missed_gate_or_what_is_held(mine, catalogue):
    catalogue.enqueue(seen(), with_adapter("/old"))
    for how in ("gate", "held"):
        if how == "gate":
            mine.failed(mine.claim(), 1, "prove", used(), Failure("gate", "KL 0.2"))
        else:
            catalogue.park(catalogue.entries(), "not now")
        catalogue.enqueue(seen(), with_adapter(f"/{how}"))
        (entry,) = catalogue.entries()
        assert (entry.job.state, entry.job.error_class) == ("parked", how)


def test_versions_that_store_recipes_otherwise_share_no_jobs(mine, catalogue, monkeypatch):
    add(catalogue)
    monkeypatch.setattr(ledger_module, "FORMAT", ledger_module.FORMAT + 1)
    newer = Ledger(mine.database)
    assert newer.claim() is None
    assert Catalogue(newer).renew() == 1
    quant = {**RECIPES["4bit"].to_json()["quantization"], "method": "new"}
    for change in ({"q_new": 1}, {"quantization": quant}):
        unknown = {**RECIPES["bf16"].to_json(), **change}
        mine.database.do(lambda c, found=unknown: c.execute(update(job).values(recipe=found)))
        assert catalogue.renew() == 0  # is left to those who know what that is
    assert newer.claim() is not None
