"""One run: look at the hub, work through what is due, tell somebody, end with a status."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from converter.batch.catalogue import Catalogue
from converter.batch.child import WARM
from converter.batch.digest import send_digest
from converter.batch.discover import Found, discover
from converter.batch.engine import Engine, Outcome, Stages
from converter.batch.ledger import Ledger
from converter.batch.site import Place, at_work
from converter.batch.tags import measured
from converter.batch.watchlist import Digest, WatchList

if TYPE_CHECKING:
    from converter.batch.dask import Scheduler
    from converter.batch.fleet import Fleet

DONE: Final = 0
FAILED: Final = 1
"""A crash, a fault of the program, or a job that was given up for another reason than below."""
UNSUPPORTED: Final = 3
GATE: Final = 4
HUB: Final = 5
TERMINATED: Final = 143
_STATUS: Final = {"unsupported": UNSUPPORTED, "usage": UNSUPPORTED, "gate": GATE} | {
    **dict.fromkeys(("hub", "refused"), HUB),
    **dict.fromkeys(("gated", "resources", "adapter", "worker"), DONE),
}
_GRAVEST: Final = (FAILED, GATE, HUB, UNSUPPORTED)


def run(
    watchlist: WatchList,
    place: Place,
    *,
    name: str,
    echo: Callable[[str], None] | None = None,
    stages: Stages | None = None,
    preload: Sequence[str] = WARM,
    scheduler: Scheduler | None = None,
) -> int:
    """Discover, convert and publish until nothing is due; the exit status for monitors.

    The work is done here, or by the workers of the fleet that ``scheduler`` knows. Raises
    UsageError when another run is at work in this state folder.
    """
    with at_work(watchlist, place, tags=measured(), echo=echo) as site:
        catalogue, say = site.catalogue, site.say
        catalogue.began(site.run_id, name)
        status: int = FAILED
        summary: dict[str, Any] = {}
        try:
            site.sweep()
            if renewed := catalogue.renew():
                say(f"{renewed} unfinished jobs start anew with other tool versions")
            if settled := catalogue.settle():
                say(f"{settled} jobs have their repo for themselves now")
            engine: Engine | Fleet
            if scheduler is None:
                settings = engine_settings(watchlist, stages)
                engine = Engine(site.ledger, site.work, say=say, preload=preload, **settings)
            else:
                engine = _fleet(site.ledger, scheduler, shared=site.shared, say=say)
            known = {entry.job.id for entry in catalogue.taken()}
            with stopping(engine):
                found = discover(
                    watchlist,
                    catalogue,
                    say=say,
                    now=time.time(),
                    stopped=partial(_is_stopping, engine),
                )
                say(f"{found.seen} releases seen, {found.matched} wanted, {found.added} new")
                refused = [e for e in catalogue.taken() if e.job.id not in known]
                for one in refused:
                    say(f"{one.release.repo}: job {one.job.id} is parked: {one.job.error}")
                outcome = engine.run()
                outcome.failed += [one.failure() for one in refused]
            site.sweep()
            status = status_of(found, outcome)
            summary = summarise(found, outcome, catalogue)
        finally:
            catalogue.ended(site.run_id, status, summary)
        say(f"ended with status {status}: {told(summary)}")
        _tell(watchlist.digest, name, status, summary, say)
        return status


def _is_stopping(engine: Engine | Fleet) -> bool:
    return engine.stopping > 0


def engine_settings(watchlist: WatchList, stages: Stages | None) -> dict[str, Any]:
    """What a watch list says about an engine on this machine."""
    if stages is None:
        from converter.batch.work import STAGES as stages
    budgets = watchlist.budgets
    return {
        "budgets": budgets,
        "workers": max(1, min(8, (os.cpu_count() or 1) // budgets.jobs)),
        "stages": stages,
        "shared": watchlist.fleet.shared is not None,
        "split": watchlist.fleet.split,
    }


def _fleet(
    ledger: Ledger, scheduler: Scheduler, *, shared: bool, say: Callable[[str], None]
) -> Fleet:
    from converter.batch.dask import distributed
    from converter.batch.fleet import Fleet

    distributed()
    return Fleet(ledger, scheduler, shared=shared, say=say)


@contextmanager
def stopping(engine: Engine | Fleet) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop the engine with grace while this lasts."""

    def stop(number: int, frame: FrameType | None) -> None:
        engine.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def status_of(found: Found, outcome: Outcome) -> int:
    """The gravest of what happened; waiting for access or room is nothing grave."""
    statuses = {
        HUB if job["state"] == "queued" else _STATUS.get(job["class"], FAILED)
        for job in settled(outcome)
    }
    if found.problems:
        statuses.add(HUB)
    if outcome.stopped:
        return TERMINATED
    return next((status for status in _GRAVEST if status in statuses), DONE)


def settled(outcome: Outcome) -> list[dict[str, Any]]:
    """The last word on each job that failed in a run and was not published after all."""
    done = {(job["repo"], job["target"]) for job in outcome.published}
    last = {(job["repo"], job["target"]): job for job in outcome.failed}
    return [job for of, job in last.items() if of not in done]


def summarise(found: Found, outcome: Outcome, catalogue: Catalogue) -> dict[str, Any]:
    """What a run came to, as its digest and the ledger tell it."""
    return {
        "seen": found.seen,
        "wanted": found.matched,
        "new": found.added,
        "published": outcome.published,
        "failed": settled(outcome),
        "problems": found.problems,
        "stages": dict(outcome.stages),
        "states": dict(Counter(entry.state for entry in catalogue.entries())),
        "stopped": outcome.stopped,
    }


def told(summary: Mapping[str, Any]) -> str:
    """A summary as one line."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary["states"].items()))
    return (
        f"{len(summary['published'])} published, {len(summary['failed'])} failed; "
        f"in the ledger: {states or 'nothing'}"
    )


def _tell(
    digest: Digest, name: str, status: int, summary: dict[str, Any], say: Callable[[str], None]
) -> None:
    happened = any(summary[key] for key in ("published", "failed", "problems"))
    if happened or digest.always:
        send_digest(digest, {"watchlist": name, "status": status, **summary}, say=say)
