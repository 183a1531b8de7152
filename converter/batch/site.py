"""Where a run or a worker is: its state folder, held alone, its ledger, the folder of its work."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from converter.batch.catalogue import Catalogue
from converter.batch.database import Database, ledger_url
from converter.batch.ledger import Ledger
from converter.batch.log import logging_to
from converter.batch.pieces import Pieces
from converter.batch.quantities import whole_path
from converter.batch.sweep import sweep
from converter.batch.watchlist import WatchList
from converter.errors import UsageError
from converter.execute.folder import explain, locked

_LONGEST_PATH: Final = 74
"""A socket's path has 107 characters, of which multiprocessing takes 33 for its own."""
_MULTIPROCESSING: Final = "pymp-"
"""How the folder begins that multiprocessing removes itself, and complains when it is gone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a ledger and its work are."""

    state: Path
    url: str

    @classmethod
    def of(cls, watchlist: WatchList | None, *, state: Path | None, ledger: str | None) -> Place:
        """From the command line, the environment, the watch list, and the defaults, in turn.

        UsageError for a folder of a user that this machine has not.
        """
        told = None if watchlist is None else watchlist.state
        where = told or default_state() if state is None else state_folder(state)
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
    return (Path(base) / "mlx-dayzero").absolute()


def state_folder(given: Path) -> Path:
    """What ``--state`` names; UsageError where that is in the home of a user unknown here."""
    try:
        return whole_path(given)
    except ValueError as error:
        raise UsageError(f"--state {error}") from error


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
    try:
        lock = locked(state / "run", flag="--state")
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


def work_folder(watchlist: WatchList, place: Place) -> Path:
    """Where releases are worked on: in the state folder, or in the one that workers share."""
    shared = watchlist.fleet.shared
    work = (shared or place.state) / "work"
    with explain(work, "--state" if shared is None else "fleet.shared"):
        work.mkdir(parents=True, exist_ok=True)
    return work
