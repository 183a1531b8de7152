"""The ledger on SQLite and PostgreSQL: claims and leases, and what becomes of failed stages."""

import multiprocessing
import time

import pytest
from batch_helpers import add, claims_of, ledger, start_forkserver, states_of, used

from converter.batch.catalogue import Catalogue
from converter.batch.claims import LeaseLostError
from converter.batch.failures import Failure
from converter.batch.ledger import Ledger

pytestmark = pytest.mark.usefixtures("closed_ledgers")


@pytest.fixture
def mine(tmp_path):
    return ledger(f"sqlite:///{tmp_path / 'ledger.db'}", first_wait=0.01)


@pytest.fixture
def catalogue(mine):
    return Catalogue(mine)


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
    assert states_of(catalogue) == {"model-bf16": "published"}


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


def test_an_older_commit_is_uploaded_before_a_newer_one_is_begun(mine, tmp_path):
    catalogue = Catalogue(mine)
    add(catalogue, commit="c1")
    old = mine.claim()
    add(catalogue, commit="c2", content="other", modified=2.0)
    other = ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    assert other.claim() is None
    mine.give_back(old)
    assert other.claim().commit == "c2"
