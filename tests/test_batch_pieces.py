"""Pieces of a conversion, and the folder that several machines share: claims, races, sweeping."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from batch_helpers import STAGES, add, ledger, used
from sqlalchemy import event, select

from converter.batch import piecework, sweep
from converter.batch.budget import Budget
from converter.batch.catalogue import Catalogue
from converter.batch.claims import LeaseLostError
from converter.batch.failures import Failure
from converter.batch.orders import Answer
from converter.batch.pieces import PIECE_BYTES, Pieces, pieces_of
from converter.batch.piecework import PieceWork
from converter.batch.schema import piece

pytestmark = pytest.mark.usefixtures("closed_ledgers")


def test_each_piece_is_claimed_once_by_workers_that_hurry(ledger_url):
    add(Catalogue(ledger(ledger_url)))
    mine = ledger(ledger_url, lease=60)
    claim = mine.claim()
    Pieces(mine).cut(claim, [task.id for task in claim.tasks], 40)
    workers = [Pieces(ledger(ledger_url, lease=60)) for _ in range(4)]
    together = threading.Barrier(len(workers))

    def take(pieces):
        together.wait()
        held = {}
        while (one := pieces.claim(held)) is not None:
            held[one.id] = one.number
        return list(held.values())

    with ThreadPoolExecutor(len(workers)) as pool:
        taken = list(pool.map(take, workers))
    assert sorted(number for some in taken for number in some) == list(range(1, 41))


def test_pieces_are_claimed_once_each_and_only_while_their_release_is_held(ledger_url):
    add(Catalogue(ledger(ledger_url)), "acme/model", "bf16", "4bit")
    mine, other = ledger(ledger_url, lease=60), ledger(ledger_url, lease=60)
    claim = mine.claim()
    pieces, theirs = Pieces(mine), Pieces(other)
    jobs = [task.id for task in claim.tasks]
    pieces.cut(claim, jobs, 3)
    first, second = pieces.claim(), theirs.claim()
    again = pieces.claim()  # the answer to the first claim was lost: it is not in hand
    assert (again.id, again.fence) == (first.id, first.fence + 1)
    assert pieces.claim([again.id], only=again.id) is None
    first = again
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


@pytest.mark.parametrize("what", ["finishes", "lives", "gives its release back"])
def test_a_worker_that_comes_back_between_two_looks_keeps_its_piece(postgres, what):
    url = postgres.database().replace(":", "+psycopg:", 1)
    add(Catalogue(ledger(url)))
    slow, quick = ledger(url, lease=60), ledger(url, lease=60)
    claim = slow.claim()
    pieces = Pieces(slow)
    pieces.cut(claim, [claim.tasks[0].id], 1)
    one = pieces.claim()
    pieces.expire(slow.owner)

    came = []

    def come_back(*given):
        if given[2].startswith("UPDATE piece") and not came:
            came.append(what)
            if what == "finishes":
                pieces.settle(one, "done")
            elif what == "lives":
                pieces.heartbeat([one])
            else:
                slow.give_back(claim)

    event.listen(quick.database.engine, "before_cursor_execute", come_back)
    assert Pieces(quick).claim() is None
    assert came == [what]


def test_pieces_are_as_many_as_the_size_wants_and_shards_allow():
    assert pieces_of(PIECE_BYTES // 2, 100) == 2  # who asked for a split gets one
    assert pieces_of(10 * PIECE_BYTES, 100) == 10
    assert pieces_of(10 * PIECE_BYTES + 1, 100) == 11
    assert pieces_of(1000 * PIECE_BYTES, 100) == 100


def test_pieces_are_begun_while_there_is_memory_for_them(tmp_path, monkeypatch):
    mine = ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    add(Catalogue(mine))
    claim = mine.claim()
    pieces = Pieces(mine)
    pieces.cut(claim, [claim.tasks[0].id], 4, memory=400)
    monkeypatch.setattr(
        piecework, "start", lambda *given: SimpleNamespace(ended=lambda say: None, kill=lambda: 0)
    )
    memory = Budget("memory", lambda: 1000)
    work = PieceWork(
        mine,
        lambda repo, commit: tmp_path,
        work=STAGES["convert"],
        context=None,
        workers=1,
        memory=memory,
        say=lambda line: None,
    )
    assert work.take(1)
    memory.reserve("a proof", 700)
    work.begin(lambda: True)
    assert work.running == []
    memory.free("a proof")
    work.begin(lambda: True)
    assert len(work.running) == 1
    assert work.take(2)
    work.begin(lambda: True)
    assert len(work.running) == 2
    assert not work.take(3)  # is left to others
    assert memory.left == 200
    work.give_back()
    assert memory.left == 1000
    assert len(pieces.open()) == 4


def test_a_piece_without_some_of_its_outputs_is_left_to_the_holder(tmp_path, monkeypatch):
    mine = ledger(f"sqlite:///{tmp_path / 'ledger.db'}", lease=60)
    add(Catalogue(mine))
    claim = mine.claim()
    pieces = Pieces(mine)
    pieces.cut(claim, [1], 1)
    answer = Answer(failed={1: Failure("adapter", "no such folder")})
    child = SimpleNamespace(ended=lambda say: answer)
    monkeypatch.setattr(piecework, "start", lambda *given: child)
    said = []
    work = PieceWork(
        mine,
        lambda repo, commit: tmp_path,
        work=STAGES["convert"],
        context=None,
        workers=1,
        memory=Budget("memory", lambda: 1000),
        say=said.append,
    )
    assert work.take(1)
    work.begin(lambda: True)
    work.listen()
    assert said[-1].endswith("is left to the holder of the release (adapter): no such folder")
    assert pieces.left(claim) == 0
    pieces.cut(claim, [1], 1)  # which is not done, and is tried again with the release
    assert pieces.left(claim) == 1


@pytest.fixture
def shared(tmp_path):
    """A ledger's address, and a folder that several machines work in."""
    work = tmp_path / "work"
    work.mkdir()
    return f"sqlite:///{tmp_path / 'ledger.db'}", work


def worked_on(work, *repos):
    for repo in repos:
        folder = work / sweep.folder_name(repo, "c1")
        folder.mkdir()
        (folder / "model.safetensors").touch()


def left_in(work):
    return sorted(path.name.partition("@")[0] for path in work.iterdir())


def test_a_shared_folder_loses_only_what_nobody_works_on(shared):
    url, work = shared
    mine, other = ledger(url), ledger(url, lease=60)
    catalogue = Catalogue(mine)
    for name in ("over", "due", "held", "parked", "pieces"):
        add(catalogue, f"acme/{name}")
    numbers = {entry.release.repo[5:]: entry.release.id for entry in catalogue.entries()}
    worked_on(work, *(f"acme/{name}" for name in numbers), "their/ledger")

    def end(name, how):
        claim = mine.claim(only=numbers[name])
        how(claim, claim.tasks[0].id)
        mine.give_back(claim)

    end("over", lambda claim, job: mine.passed(claim, job, "publish", used(), published=True))
    no = Failure("unsupported", "no map")
    end("parked", lambda claim, job: mine.failed(claim, job, "examine", used(), no))
    held = other.claim(only=numbers["held"])
    cut = other.claim(only=numbers["pieces"])
    pieces = Pieces(other)
    pieces.cut(cut, [cut.tasks[0].id], 2)
    assert pieces.claim() is not None
    for repo in ("acme/held", "acme/pieces"):  # a newer commit makes these no longer wanted
        add(catalogue, repo, commit="c2", content="other weights")
    other.give_back(cut)  # one of its pieces goes on
    sweep.sweep(work, catalogue, shared=True)
    assert left_in(work) == ["acme--due", "acme--held", "acme--pieces", "their--ledger"]
    other.give_back(held)
    pieces.expire(other.owner)
    sweep.sweep(work, catalogue, shared=True)
    assert left_in(work) == ["acme--due", "their--ledger"]
    found = mine.database.do(lambda connection: connection.execute(select(piece)).all())
    assert found == []  # nobody is to believe what lay in that folder
    assert {entry.release.owner for entry in catalogue.entries()} == {None}


def test_a_release_that_is_begun_while_folders_are_swept_keeps_its_own(shared, monkeypatch):
    url, work = shared
    catalogue = Catalogue(ledger(url))
    add(catalogue, "acme/model")
    worked_on(work, "acme/model")
    assert ledger(url, lease=60).claim() is not None
    stale = [(entry.release.id, "acme/model", "c1") for entry in catalogue.entries()]
    monkeypatch.setattr(sweep, "_idle_releases", lambda mine: stale)
    sweep.sweep(work, catalogue, shared=True)
    assert left_in(work) == ["acme--model"]


def test_a_folder_that_another_machine_sweeps_meanwhile_ends_nothing(shared, monkeypatch):
    url, work = shared
    mine = ledger(url)
    for name in ("gone", "denied", "over"):
        add(Catalogue(mine), f"acme/{name}")
        worked_on(work, f"acme/{name}")
        claim = mine.claim()
        mine.passed(claim, claim.tasks[0].id, "publish", used(), published=True)
        mine.give_back(claim)
    rename = type(work).rename

    def refused(path, target):
        for name, error in (("gone", FileNotFoundError), ("denied", PermissionError)):
            if path.name.startswith(f"acme--{name}"):
                raise error(path)
        return rename(path, target)

    monkeypatch.setattr(type(work), "rename", refused)
    sweep.sweep(work, Catalogue(mine), shared=True)
    assert left_in(work) == ["acme--denied", "acme--gone"]
    assert {entry.release.owner for entry in Catalogue(mine).entries()} == {None}


def test_a_piece_whose_job_is_over_is_left_alone(ledger_url):
    catalogue = Catalogue(ledger(ledger_url))
    add(catalogue, "acme/model", "bf16", "4bit")
    mine, other = ledger(ledger_url, lease=60), ledger(ledger_url, lease=60)
    claim = mine.claim()
    pieces, theirs = Pieces(mine), Pieces(other)
    pieces.cut(claim, [task.id for task in claim.tasks], 3)
    first = theirs.claim()
    catalogue.park(catalogue.entries()[:1], "not this one")
    assert (theirs.open(), theirs.claim([first.id])) == ([], None)
    assert pieces.left(claim) == 1  # the one that somebody has
    theirs.settle(first, "done")
    assert pieces.left(claim) == 0
    assert pieces.clear(claim) == 0
