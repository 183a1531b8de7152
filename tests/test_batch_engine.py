"""The engine with stages that only pretend: order, overlap, budgets, crashes, stops, leases."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from batch_helpers import (
    PRELOAD,
    STAGES,
    add,
    catalogue_of,
    engine,
    ledger,
    start_run,
    states,
    story,
    wait_for,
    watch,
)

from converter.batch import engine as engine_module
from converter.batch import run as run_module
from converter.batch.discover import Found
from converter.batch.engine import Outcome
from converter.batch.orders import Answer
from converter.batch.progress import Step
from converter.batch.recipes import Policy
from converter.batch.run import status_of
from converter.batch.site import Place
from converter.batch.sweep import sweep

pytestmark = pytest.mark.usefixtures("forkserver", "closed_ledgers")


def test_variants_go_together_until_they_are_proved(place):
    add(catalogue_of(place), "acme/model", "bf16", "4bit")
    outcome = engine(place).run()
    begun = [(stage, parts) for _, stage, what, _, parts in story(place[1]) if what == "begin"]
    assert begun[:3] == [("examine", 2), ("fetch", 2), ("convert", 2)]
    assert Counter(begun[3:]) == {("prove", 1): 2, ("publish", 1): 2}
    assert states(place) == {"model-bf16": "published", "model-4bit": "published"}
    assert {job["address"] for job in outcome.published} == {"http://hub/1", "http://hub/2"}
    assert [path.name for path in place[1].iterdir()] == ["story.jsonl"]
    stages = {row.stage for row in catalogue_of(place).attempts()}
    assert stages == {"examine", "fetch", "convert", "prove", "publish"}
    assert all(row.peak_memory > 1e6 for row in catalogue_of(place).attempts())


def spans(folder, stage):
    begun, found = {}, []
    for when, name, what, repo, _ in story(folder):
        if name == stage:
            if what == "begin":
                begun[repo] = when
            else:
                found.append((begun.pop(repo), when, repo))
    return found


def overlap(a, b):
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b if x[2] != y[2])


def test_downloads_conversions_and_uploads_overlap_one_of_each(place):
    for name in ("slow-convert-0.5", "slow-fetch-0.4", "slow-publish-0.3", "good"):
        add(catalogue_of(place), f"acme/{name}")
    engine(place).run()
    assert set(states(place).values()) == {"published"}
    found = {name: spans(place[1], name) for name in ("fetch", "convert", "publish")}
    assert overlap(found["fetch"], found["convert"])
    for one in found.values():  # one slot each
        assert not overlap(one, one)
    heavy = found["convert"] + spans(place[1], "prove") + spans(place[1], "examine")
    assert not overlap(heavy, heavy)


def test_disk_is_counted_before_anything_is_downloaded(place):
    for name in ("needs-600", "needs-x-600", "needs-2000"):
        add(catalogue_of(place), f"acme/{name}")
    lines = []
    budgets = {"disk": 1000, "downloads": 4, "jobs": 4, "uploads": 4}
    outcome = engine(place, lines, budgets=budgets, patience=0.1).run()
    assert states(place) == {
        "needs-600-bf16": "published",
        "needs-x-600-bf16": "published",
        "needs-2000-bf16": "waiting",
    }
    held = [
        (begin[0], end[1], begin[2])
        for begin, end in zip(
            sorted(spans(place[1], "fetch"), key=lambda s: s[2]),
            sorted(spans(place[1], "publish"), key=lambda s: s[2]),
            strict=True,
        )
    ]
    assert not overlap(held, held)
    (refused,) = outcome.failed
    assert refused["class"] == "resources"
    assert refused["reason"] == "acme/needs-2000: needs 2.0 kB of disk and may use 1.0 kB"
    assert status_of(Found(), outcome) == 0


def test_memory_is_counted_before_anything_is_downloaded(place):
    add(catalogue_of(place), "acme/needs-2000")
    outcome = engine(place, budgets={"memory": 1500}, patience=0.1).run()
    assert outcome.failed[0]["reason"].endswith("needs 2.0 kB of memory and may use 1.5 kB")
    assert spans(place[1], "fetch") == []


def test_one_crash_is_tried_again_and_two_are_quarantined(place):
    add(catalogue_of(place), "acme/kill-convert")
    add(catalogue_of(place), "acme/good")
    add(catalogue_of(place), "acme/raise-fetch")
    lines = []
    outcome = engine(place, lines).run()
    assert states(place) == {
        "kill-convert-bf16": "quarantined",
        "good-bf16": "published",
        "raise-fetch-bf16": "quarantined",
    }
    by_name = {e.job.target: e.job for e in catalogue_of(place).entries()}
    killed = by_name["night/kill-convert-bf16"]
    assert (killed.error_class, killed.crashes) == ("crash", 2)
    assert killed.error == (
        "the process was killed by SIGKILL in stage convert, as the system does when memory runs "
        "out"
    )
    assert by_name["night/raise-fetch-bf16"].error == "RuntimeError: a fault of the program"
    assert any("Traceback" in line for line in lines)
    crashed = [row for row in catalogue_of(place).attempts() if row.outcome == "crash"]
    assert [row.stage for row in crashed] == ["convert", "convert"]
    assert status_of(Found(), outcome) == 1
    sweep(place[1], catalogue_of(place))
    assert [p.name for p in place[1].iterdir() if p.is_dir()] == []


def test_acceptance_goes_to_whoever_has_the_tag_from_what_the_folder_holds(place):
    add(catalogue_of(place), "acme/model", "bf16", policy=Policy(accept="metal"))
    engine(place).run()  # its folder is its own, so it makes nothing that it could not carry over
    assert (states(place), story(place[1])) == ({"model-bf16": "waiting"}, [])
    catalogue_of(place).retry(catalogue_of(place).entries())
    outcome = engine(place, shared=True).run()
    assert [job["state"] for job in outcome.failed] == ["waiting"]
    assert status_of(Found(), outcome) == 0
    assert [s for _, s, what, _, _ in story(place[1]) if what == "end"][-1] == "prove"
    sweep(place[1], catalogue_of(place), shared=True)
    assert [path.name for path in place[1].iterdir() if path.is_dir()] == ["acme--model@c1"]
    engine(place, shared=True).run()  # is not asked again
    engine(place, shared=True, tags={"metal"}).run()
    assert states(place) == {"model-bf16": "published"}
    stages = [s for _, s, what, _, _ in story(place[1]) if what == "end"]
    assert stages.count("accept") == 1
    assert stages[-2:] == ["accept", "publish"]
    assert [path.name for path in place[1].iterdir()] == ["story.jsonl"]


def test_transient_failures_back_off_within_the_run(place):
    add(catalogue_of(place), "acme/flaky-fetch", "bf16", "4bit")
    outcome = engine(place).run()
    assert set(states(place).values()) == {"published"}
    outcomes = Counter(row.outcome for row in catalogue_of(place).attempts() if row.job_id == 1)
    assert outcomes["hub"] == 3  # both variants wait, and are read, together
    assert status_of(Found(), outcome) == 0


def test_a_retry_beyond_patience_is_left_to_the_next_run(place):
    add(catalogue_of(place), "acme/flaky-fetch")
    outcome = engine(place, first_wait=60, longest_wait=60).run()
    assert states(place) == {"flaky-fetch-bf16": "queued"}
    assert status_of(Found(), outcome) == 5
    kept = [path for path in place[1].iterdir() if path.is_dir()]
    assert len(kept) == 1
    sweep(place[1], catalogue_of(place))
    assert kept[0].is_dir()  # a retry goes on from it


def test_stop_gives_back_what_can_be_resumed_and_lets_uploads_end(place):
    add(catalogue_of(place), "acme/slow-publish-1")
    add(catalogue_of(place), "acme/slow-convert-600")
    mine = engine(place)
    thread = threading.Thread(target=mine.run)
    thread.start()
    wait_for(lambda: {"publish", "convert"} <= {s for _, s, w, r, _ in story(place[1])
             if f"slow-{s}" in r})  # fmt: skip
    mine.stop()
    thread.join(timeout=180)
    assert not thread.is_alive()
    assert states(place) == {"slow-publish-1-bf16": "published", "slow-convert-600-bf16": "queued"}
    entries = {e.release.repo: e for e in catalogue_of(place).entries()}
    given = entries["acme/slow-convert-600"]
    assert (given.release.owner, given.job.attempts, given.job.crashes) == (None, {}, 0)
    assert status_of(Found(), mine.outcome) == 143


def test_work_whose_lease_has_passed_is_dropped(place, monkeypatch):
    add(catalogue_of(place), "acme/slow-convert-600")
    lines = []
    mine = engine(place, lines, lease=0.4, patience=0.01)
    beats = []
    monkeypatch.setattr(mine.ledger, "heartbeat", lambda claims: beats.append(1) or set())
    thread = threading.Thread(target=mine.run)
    thread.start()
    wait_for(lambda: any(s == "convert" for _, s, _, _, _ in story(place[1])))
    wait_for(lambda: beats)
    other = ledger(place[0], lease=60)
    wait_for(lambda: other.claim() is not None)
    monkeypatch.undo()
    thread.join(timeout=180)
    assert not thread.is_alive()
    assert any("the lease has passed to another worker" in line for line in lines)
    (entry,) = catalogue_of(place).entries()
    assert (entry.release.owner, entry.job.crashes) == (other.owner, 0)


def test_a_killed_run_takes_its_children_along_and_loses_nothing(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("k")  # short: a run keeps sockets in its own folder then
    state = tmp_path / "state"
    url = f"sqlite:///{state / 'ledger.db'}"
    state.mkdir()
    add(catalogue_of((url, None)), "acme/once-convert-600")
    first = start_run(state)
    try:
        work = state / "work"
        wait_for(lambda: any(s == "convert" for _, s, _, _, _ in story(work)))
        second = start_run(state)
        said, _ = second.communicate(timeout=180)
        assert second.returncode == 1
        assert "another run is at work here" in said
    finally:
        first.kill()
    first.communicate(timeout=180)
    wait_for(lambda: not children_in(work))
    third = start_run(state)
    said, _ = third.communicate(timeout=180)
    assert third.returncode == 0, said
    assert "the last run here was killed with 1 releases in hand" in said
    assert "Traceback" not in said
    assert list((state / "tmp").iterdir()) == []
    (entry,) = catalogue_of((url, None)).entries()
    assert (entry.job.state, entry.job.lost) == ("published", 1)
    assert [path.name for path in work.iterdir()] == ["story.jsonl"]


def children_in(folder):
    """Processes that have a file open below a folder or work there, by their environment."""
    found = []
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes()
                program = str(folder.parent / "program.py").encode()
                if program in command:
                    found.append(int(process))
            except OSError:
                continue
    return found


def test_sigterm_ends_a_run_in_order(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    url = f"sqlite:///{state / 'ledger.db'}"
    add(catalogue_of((url, None)), "acme/slow-convert-600")
    run = start_run(state)
    try:
        wait_for(lambda: any(s == "convert" for _, s, _, _, _ in story(state / "work")))
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=180)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 143, said
    (entry,) = catalogue_of((url, None)).entries()
    assert (entry.job.state, entry.release.owner, entry.job.lost) == ("queued", None, 0)
    (ended,) = catalogue_of((url, None)).runs()
    assert (ended.status, ended.summary["stopped"]) == (143, True)


@pytest.mark.parametrize(
    ("classes", "status"),
    [
        ([], 0),
        ([("parked", "unsupported")], 3),
        ([("parked", "unsupported"), ("parked", "gate")], 4),
        ([("parked", "unsupported"), ("queued", "hub")], 5),
        ([("waiting", "gated"), ("waiting", "resources")], 0),
        ([("quarantined", "crash"), ("parked", "gate")], 1),
        ([("queued", "crash")], 5),
    ],
)
def test_exit_status(classes, status):
    failed = [
        {"target": f"n/{number}", "repo": "a/b", "state": state, "class": kind}
        for number, (state, kind) in enumerate(classes)
    ]
    assert status_of(Found(), Outcome(failed=failed)) == status


def test_one_output_of_a_release_is_proved_or_accepted_at_a_time(place):
    add(catalogue_of(place), "acme/model", "bf16", "4bit", policy=Policy(accept="metal"))
    mine = engine(place, budgets={"jobs": 4, "memory": 100}, tags={"metal"})
    mine._claim()
    (hand,) = mine._hands.values()
    both = hand.order.parts
    hand.needs = {"memory": 60, "convert": 60}
    for stage in ("examine", "fetch", "convert"):
        hand.settled(Step(stage, both), Answer())
    hand.settled(Step("prove", both[:1]), Answer())
    accept = Step("accept", both[:1])
    assert list(hand.ready()) == [accept]
    assert mine._room(hand, accept)
    # One that is somehow beside it has memory of its own, which its end alone frees.
    assert not mine._room(hand, Step("prove", both[1:]))
    mine._memory.free(engine_module._key(hand, Step("prove", both[1:])))
    assert mine._memory.left == 40
    mine._forget(hand)
    assert mine._memory.left == 100


def test_a_release_that_is_gone_on_with_has_what_its_folder_holds_already(place, monkeypatch):
    add(catalogue_of(place), "acme/model")
    mine = engine(place, budgets={"disk": 10**6})
    mine._claim()
    (hand,) = mine._hands.values()
    (hand.order.folder / "hub").mkdir(parents=True)
    with (hand.order.folder / "hub" / "blob").open("wb") as file:
        file.write(os.urandom(500_000))
        os.fsync(file.fileno())
    (hand.order.folder / "hub" / "link").symlink_to("blob")
    free = SimpleNamespace(free=350_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    fetch = Step("fetch", hand.order.parts)
    hand.needs = {"disk": 800_000}
    assert mine._room(hand, fetch)
    mine._disk.free(hand.claim.release)
    hand.needs = {"disk": 1_100_000}
    assert not mine._room(hand, fetch)
    (told,) = mine.outcome.failed
    assert "needs 1.1 MB of disk and may use 8" in told["reason"]
    free.free = 10**9
    assert mine._disk.refusal(1_100_000, there=500_000).endswith("may use 1.0 MB")


def test_grace_is_shorter_than_what_a_service_manager_waits():
    from converter.batch.install import STOP_S

    assert engine_module.GRACE_S < STOP_S


def test_a_run_tells_once_of_a_job_whose_repo_is_anothers(tmp_path, monkeypatch):
    def discover(watchlist, catalogue, **named):
        add(catalogue, "acme/model")
        add(catalogue, "other/model")
        return Found()

    monkeypatch.setattr(run_module, "discover", discover)
    place = Place.of(None, state=tmp_path / "state", ledger=None)
    lines = []
    told = {"name": "watch.toml", "echo": lines.append, "stages": STAGES, "preload": PRELOAD}
    assert run_module.run(watch(tmp_path), place, **told) == 3
    assert run_module.run(watch(tmp_path), place, **told) == 0
    again, first = [one.summary for one in catalogue_of((place.url, None)).runs()]
    assert [job["address"] for job in first["published"]] == ["http://hub/1"]
    assert [(job["repo"], job["class"]) for job in first["failed"]] == [("other/model", "usage")]
    assert (again["published"], again["failed"]) == ([], [])
    (line,) = [line for line in lines if "is parked" in line]
    assert "other/model: job 2 is parked: night/model-bf16 is made from acme/model alr" in line
