"""One run: look at the hub, work through what is due, tell somebody, end with a status."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from converter.batch.catalogue import Catalogue
from converter.batch.child import WARM
from converter.batch.database import Database, ledger_url
from converter.batch.digest import send_digest
from converter.batch.discover import Found, discover
from converter.batch.engine import Engine, Outcome, Stages
from converter.batch.ledger import Ledger
from converter.batch.log import logging_to
from converter.batch.pieces import Pieces
from converter.batch.sweep import sweep
from converter.batch.tags import measured
from converter.batch.watchlist import Digest, WatchList
from converter.errors import UsageError
from converter.execute.folder import locked

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
_LONGEST_PATH: Final = 74
"""A socket's path has 107 characters, of which multiprocessing takes 33 for its own."""
_MULTIPROCESSING: Final = "pymp-"
"""How the folder begins that multiprocessing removes itself, and complains when it is gone."""
_STATUS: Final = {"unsupported": UNSUPPORTED, "usage": UNSUPPORTED, "gate": GATE} | {
    **dict.fromkeys(("hub", "refused"), HUB),
    **dict.fromkeys(("gated", "resources", "worker"), DONE),
}
_GRAVEST: Final = (FAILED, GATE, HUB, UNSUPPORTED)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a ledger and its work are."""

    state: Path
    url: str

    @classmethod
    def of(cls, watchlist: WatchList | None, *, state: Path | None, ledger: str | None) -> Place:
        """From the command line, the environment, the watch list, and the defaults, in turn."""
        told = None if watchlist is None else watchlist.state
        where = (state or told or default_state()).expanduser().absolute()
        url = ledger or os.environ.get("CONVERT_LEDGER")
        url = url or (None if watchlist is None else watchlist.ledger)
        return cls(where, ledger_url(url, where))


def worker_name(state: Path) -> str:
    """How the leases of runs in this state folder begin: unlike those of any other folder."""
    path = state / "worker"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return f"{platform.node() or 'localhost'}:{path.read_text(encoding='utf-8')}:"


def default_state() -> Path:
    """The folder of ledger, work and logs when none is named."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "mlx-dayzero"


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
            engine: Engine | Fleet
            if scheduler is None:
                settings = engine_settings(watchlist, stages)
                engine = Engine(site.ledger, site.work, say=say, preload=preload, **settings)
            else:
                engine = _fleet(site.ledger, scheduler, shared=site.shared, say=say)
            with stopping(engine):
                found = discover(watchlist, catalogue, say=say, now=time.time())
                say(f"{found.seen} releases seen, {found.matched} wanted, {found.added} new")
                outcome = engine.run()
            site.sweep()
            status = status_of(found, outcome)
            summary = summarise(found, outcome, catalogue)
        finally:
            catalogue.ended(site.run_id, status, summary)
        say(f"ended with status {status}: {told(summary)}")
        _tell(watchlist.digest, name, status, summary, say)
        return status


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a run or a worker has while it lasts: a ledger, a folder, and somebody to tell."""

    run_id: str
    worker: str
    """How the names of this state folder's leases begin."""
    ledger: Ledger
    catalogue: Catalogue
    work: Path
    shared: bool
    """Whether other machines work in the same folder."""
    say: Callable[[str], None]

    def sweep(self) -> None:
        """Remove what nothing more is to be done for."""
        sweep(self.work, self.catalogue, shared=self.shared)


@contextmanager
def at_work(
    watchlist: WatchList,
    place: Place,
    *,
    tags: frozenset[str],
    echo: Callable[[str], None] | None,
) -> Iterator[Site]:
    """Hold a state folder and its ledger, what a run that was killed there held being free again.

    Raises UsageError when another run or worker is at work in it.
    """
    run_id = uuid.uuid4().hex
    with (
        alone(place.state),
        temporary(place.state),
        logging_to(place.state / "logs", run_id, echo=echo) as say,
    ):
        database = Database(place.url)
        try:
            worker = worker_name(place.state)
            owner = f"{worker}{run_id[:8]}"
            ledger = Ledger(database, retries=watchlist.retries, owner=owner, tags=tags)
            Pieces(ledger).expire(worker)
            if gone := ledger.expire(worker):  # nobody else can hold this folder's lock
                say(f"the last run here was killed with {gone} releases in hand")
            yield Site(
                run_id=run_id,
                worker=worker,
                ledger=ledger,
                catalogue=Catalogue(ledger),
                work=work_folder(watchlist, place),
                shared=watchlist.fleet.shared is not None,
                say=say,
            )
        finally:
            database.close()


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold a state folder against other runs and workers; UsageError when one has it."""
    state.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(state / "run")
        lock.__enter__()
    except UsageError as error:
        raise UsageError(
            f"{state}: another run is at work here; wait for it, or give each machine's workers a "
            "--state of their own"
        ) from error
    try:
        yield
    finally:
        (state / "run").rmdir()
        lock.__exit__(None, None, None)


@contextmanager
def temporary(state: Path) -> Iterator[None]:
    """Keep the temporary files of this run and its children in one place, and empty it.

    What a killed run left there goes too. Sockets have short names only: where the state folder's
    own is long, they and all else go to the system's place.
    """
    folder = state / "tmp"
    shutil.rmtree(folder, ignore_errors=True)
    if len(str(folder)) > _LONGEST_PATH:
        yield
        return
    folder.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        for left in folder.iterdir():
            if left.is_dir() and not left.name.startswith(_MULTIPROCESSING):
                shutil.rmtree(left, ignore_errors=True)
            elif not left.is_dir():
                left.unlink(missing_ok=True)


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


def work_folder(watchlist: WatchList, place: Place) -> Path:
    """Where releases are worked on: in the state folder, or in the one that workers share."""
    work = (watchlist.fleet.shared or place.state).expanduser().absolute() / "work"
    work.mkdir(parents=True, exist_ok=True)
    return work


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
    done = {job["target"] for job in outcome.published}
    return list(
        {job["target"]: job for job in outcome.failed if job["target"] not in done}.values()
    )


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
