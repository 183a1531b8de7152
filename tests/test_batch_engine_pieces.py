"""Engines that share a folder: conversions in pieces, and what of a release stays for whom."""

import threading
import time

import pytest
from batch_helpers import (
    add,
    catalogue_of,
    engine,
    ledger,
    states,
    story,
    used,
)
from sqlalchemy import select, update

from converter.batch.failures import Failure
from converter.batch.fleet_worker import Service
from converter.batch.orders import Answer
from converter.batch.pieces import Pieces
from converter.batch.progress import Step
from converter.batch.schema import job, piece
from converter.batch.sweep import sweep


def test_a_large_conversion_is_in_pieces_that_other_engines_help_with(place, monkeypatch):
    monkeypatch.setattr("converter.batch.pieces.PIECE_BYTES", 250)
    add(catalogue_of(place), "acme/cut-4")
    lines, helped = [], []
    helper = engine(place, helped, shared=True, patience=1000)
    mine = engine(place, lines, shared=True, split=1000)
    thread = threading.Thread(target=helper.run)
    mine._claim()
    thread.start()
    mine.run()
    helper.stop()
    thread.join(timeout=180)
    assert states(place) == {"cut-4-bf16": "published"}
    begun = [line for line in lines + helped if "convert piece" in line]
    assert sorted(begun) == [f"acme/cut-4@c1: convert piece {n} of 4" for n in (1, 2, 3, 4)]
    assert any("convert in 4 pieces" in line for line in lines)
    converted = [s for _, s, what, _, _ in story(place[1]) if (s, what) == ("convert", "end")]
    assert len(converted) == 5  # and once to finish
    found = mine.ledger.database.do(lambda connection: connection.execute(select(piece)).all())
    assert found == []


def test_pieces_that_are_made_outlive_a_stop(place):
    add(catalogue_of(place), "acme/cut-4")
    first, helper = engine(place, shared=True, split=1000), Pieces(ledger(place[0]))

    def offered(mine):
        mine._claim()
        (hand,) = mine._hands.values()
        hand.cuts = 4
        hand.needs = {"convert": 7}
        assert mine._with_others(hand, Step("convert", hand.order.parts))
        return hand

    hand = offered(first)
    made = helper.claim()
    assert made.memory == 7
    helper.settle(made, "done")
    going_on = helper.claim([made.id])
    first.stop()
    first.run()
    assert (hand.claim.release in first._hands, states(place)) == (False, {"cut-4-bf16": "queued"})
    second = engine(place, shared=True, split=1000)
    again = offered(second)
    assert helper.left(again.claim) == 1
    assert helper.heartbeat([going_on]) == set()
    # Once the outputs are whole nobody is to go on from them, whatever becomes of their proofs.
    second._settle(again, Step("convert", again.order.parts), used(), Answer())
    assert helper.heartbeat([going_on]) == {going_on.id}


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_stays_while_another_variant_will_go_on_from_it(place, shared):
    add(catalogue_of(place), "acme/model", "bf16", "4bit")
    mine = engine(place, shared=shared)
    later = update(job).where(job.c.variant == "4bit").values(not_before=time.time() + 1000)
    mine.ledger.database.do(lambda connection: connection.execute(later))
    mine.run()
    assert states(place) == {"model-bf16": "published", "model-4bit": "queued"}
    assert [path.name for path in place[1].iterdir() if path.is_dir()] == ["acme--model@c1"]
    catalogue_of(place).retry(catalogue_of(place).entries()[1:])
    engine(place, shared=shared).run()
    assert [path.name for path in place[1].iterdir()] == ["story.jsonl"]


def test_pieces_go_with_their_jobs_and_the_folder_once_nobody_is_at_work_in_it(place):
    add(catalogue_of(place), "acme/unsupported")
    mine, theirs = engine(place, shared=True), Pieces(ledger(place[0], lease=60))
    mine._claim()
    (hand,) = mine._hands.values()
    hand.order.folder.mkdir()
    Pieces(mine.ledger).cut(hand.claim, [1], 2)  # by whoever had the release before
    one = theirs.claim()
    step = Step("convert", hand.order.parts)
    mine._settle(hand, step, used(), Failure("unsupported", "no map"))
    mine._drop(hand)
    assert theirs.heartbeat([one]) == {one.id}
    assert hand.order.folder.is_dir()  # until its worker has seen that
    sweep(place[1], catalogue_of(place), shared=True)
    assert not hand.order.folder.exists()


def test_a_busy_engine_leaves_pieces_to_others(place):
    add(catalogue_of(place), "acme/cut-4")
    mine, other = engine(place, shared=True), ledger(place[0], lease=60)
    claim = other.claim()
    Pieces(other).cut(claim, [claim.tasks[0].id], 1)
    add(catalogue_of(place), "acme/model")
    mine._claim()
    mine._begin()  # its own release takes the slot
    assert [child.stage for child, _, _ in mine._children] == ["examine"]
    assert len(Pieces(ledger(place[0])).open()) == 1
    mine.stop()
    mine.run()


def test_a_worker_claims_a_piece_that_it_can_start(place):
    add(catalogue_of(place), "acme/model")
    other = ledger(place[0], lease=60)
    claim = other.claim()
    Pieces(other).cut(claim, [claim.tasks[0].id], 3)
    mine = engine(place, shared=True, made=Service)
    answers = [mine.ask("piece", number, "acme/model", "c1") for number in (1, 2)]
    mine._claim()
    assert [answer.done() and not answer.result() for answer in answers] == [False, True]
    assert [one.number for _, one in mine._piecework.running] == [1]
    assert [one.id for one in Pieces(ledger(place[0])).open()] == [2, 3]
    mine.stop()
    mine.run()
