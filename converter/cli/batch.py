"""``convert batch``: many releases, unattended."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.errors import UsageError

if TYPE_CHECKING:
    from converter.batch.catalogue import Catalogue, Entry

_STATE = (
    "Folder of ledger, work and logs; default: the watch list's, or ~/.local/state/mlx-dayzero."
)
_LEDGER = (
    "SQLAlchemy URL; default: CONVERT_LEDGER, the watch list's, or SQLite in the state folder."
)
_place = (
    click.option("--state", type=click.Path(path_type=Path), help=_STATE),
    click.option("--ledger", help=_LEDGER),
)
_looked_at = (
    click.option(
        "--watchlist",
        type=click.Path(path_type=Path),
        help="Look where this watch list says that state and ledger are.",
    ),
    *_place,
)
_tls = (
    click.option("--tls-ca-file", "ca_file", help="Certificates that the fleet trusts (PEM)."),
    click.option("--tls-cert", "cert", help="This machine's certificate (PEM)."),
    click.option("--tls-key", "key", help="Its private key (PEM)."),
)
_patterns = click.argument("jobs", nargs=-1, required=True)


def _all(options: tuple[Any, ...]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_placed, _found, _secured = _all(_place), _all(_looked_at), _all(_tls)


@click.group()
def batch() -> None:
    """Watch releases, and convert, prove and publish them unattended.

    The watch list says which and into what. JOBS are numbers, sources (REPO or REPO@COMMIT) or
    targets as `status` shows them, with * and ?.
    """


@batch.command(name="run")
@click.argument("watchlist", type=click.Path(path_type=Path))
@_placed
@click.option("--scheduler", help="Let a Dask fleet do the work: tcp://HOST:PORT or tls://...")
@_secured
@click.option("--quiet", is_flag=True, help="Print nothing; the log file tells all.")
def batch_run(
    watchlist: Path,
    state: Path | None,
    ledger: str | None,
    scheduler: str | None,
    quiet: bool,
    **tls: str | None,
) -> None:
    """Find what is new, and work until nothing is due.

    Safe to repeat, to interrupt and to kill. The exit status is the gravest of what happened: 0
    all well, 3 something is unsupported, 5 the hub failed, 4 a gate was not met, 1 a crash.
    """
    from converter.batch.dask import Scheduler
    from converter.batch.run import run
    from converter.batch.site import Place
    from converter.batch.watchlist import read_watchlist

    read = read_watchlist(watchlist)
    if scheduler is None and any(tls.values()):
        raise UsageError("--tls-ca-file, --tls-cert and --tls-key go with --scheduler")
    place = Place.of(read, state=state, ledger=ledger)
    status = run(
        read,
        place,
        name=watchlist.name,
        echo=_echo(quiet),
        scheduler=None if scheduler is None else Scheduler.of(scheduler, **tls),
    )
    if status:
        click.get_current_context().exit(status)


@batch.command(name="worker")
@click.argument("scheduler")
@click.argument("watchlist", type=click.Path(path_type=Path))
@_placed
@click.option("--tag", "tags", multiple=True, help="What else this machine has; may be repeated.")
@_secured
@click.option("--quiet", is_flag=True, help="Print nothing; the log file tells all.")
def batch_worker(
    scheduler: str,
    watchlist: Path,
    state: Path | None,
    ledger: str | None,
    tags: tuple[str, ...],
    quiet: bool,
    **tls: str | None,
) -> None:
    """Work for a Dask fleet until SIGTERM.

    SCHEDULER is tcp://HOST:PORT or tls://HOST:PORT; of WATCHLIST its ledger, state, retries and
    budgets count.
    """
    from converter.batch.dask import Scheduler
    from converter.batch.fleet_worker import serve
    from converter.batch.site import Place
    from converter.batch.tags import with_own
    from converter.batch.watchlist import read_watchlist

    read = read_watchlist(watchlist, inputs=False)
    place = Place.of(read, state=state, ledger=ledger)
    where = Scheduler.of(scheduler, **tls)
    status = serve(read, place, where, tags=with_own(tags), echo=_echo(quiet))
    click.get_current_context().exit(status)


def _echo(quiet: bool) -> Callable[[str], None] | None:
    return None if quiet else lambda line: print(line, file=sys.stderr, flush=True)


@batch.command(name="status")
@_found
@click.option("--all", "everything", is_flag=True, help="Also jobs that newer ones replaced.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known.")
def batch_status(everything: bool, as_json: bool, **where: Any) -> None:
    """List all jobs, and why those that failed did."""
    from converter.batch.status import print_table, rows_of

    entries = _catalogue(**where).entries(superseded=everything)
    if as_json:
        click.echo(json.dumps(rows_of(entries), indent=1))
    else:
        print_table(entries)


@batch.command(name="report")
@click.argument("out", type=click.Path(path_type=Path), default=Path("batch.html"))
@_found
def batch_report(out: Path, **where: Any) -> None:
    """Write all runs and jobs as one HTML page.

    OUT is batch.html unless given; the page needs no other file and runs no script.
    """
    from converter.batch.report import write_report

    write_report(_catalogue(**where), out)
    click.echo(str(out))


@batch.command(name="retry")
@_patterns
@_found
def batch_retry(jobs: tuple[str, ...], **where: Any) -> None:
    """Make JOBS due at once, as if never tried.

    The next run does them. Numbers, sources or targets, with * and ?.
    """
    catalogue = _catalogue(**where)
    chosen = _chosen(catalogue, jobs, ("parked", "quarantined", "waiting", "queued"))
    refused = catalogue.retry(chosen)
    _tell("due", [entry for entry in chosen if entry.job.id not in refused])
    if refused:
        raise UsageError(
            "\n".join(f"job {number} stays parked: {why}" for number, why in refused.items())
        )


@batch.command(name="park")
@_patterns
@_found
@click.option("--reason", default="parked by hand", show_default=True, help="Shown in status.")
def batch_park(jobs: tuple[str, ...], reason: str, **where: Any) -> None:
    """Leave JOBS alone until `retry` names them.

    Numbers, sources or targets, with * and ?. A new commit of a release makes new jobs.
    """
    catalogue = _catalogue(**where)
    chosen = _chosen(catalogue, jobs, ("queued", "waiting", "parked", "quarantined"))
    catalogue.park(chosen, reason)
    _tell("parked", chosen)


@batch.command(name="forget")
@_patterns
@_found
def batch_forget(jobs: tuple[str, ...], **where: Any) -> None:
    """Remove JOBS and their history from the ledger.

    Numbers, sources or targets, with * and ?. What is published stays published, and what a watch
    list still names is found anew by its next run.
    """
    catalogue = _catalogue(**where)
    chosen = _chosen(catalogue, jobs, None)
    catalogue.forget(chosen)
    _tell("forgotten", chosen)


@batch.command(name="install")
@click.argument("watchlist", type=click.Path(path_type=Path))
@_placed
@click.option("--at", default="02:30", show_default=True, help="Local time of day, HH:MM.")
@click.option("--kind", type=click.Choice(["systemd", "launchd", "cron"]), help="Default: by host.")
@click.option("--write", is_flag=True, help="Write the files instead of printing them.")
def batch_install(
    watchlist: Path, state: Path | None, ledger: str | None, at: str, kind: str | None, write: bool
) -> None:
    """Make this machine run WATCHLIST every night.

    Prints a systemd timer, a launchd plist or a cron line, and what turns it on.
    """
    from converter.batch.install import default_kind, schedule, write_files
    from converter.batch.watchlist import read_watchlist

    read_watchlist(watchlist)
    if ledger is not None:
        raise UsageError(
            "--ledger: a URL with a password does not belong into a unit file; put it into the "
            "watch list as ${NAME}, or into CONVERT_LEDGER of the unit's environment"
        )
    plan = schedule(watchlist, state=state, at=at, kind=kind or default_kind())
    if write:
        for path in write_files(plan):
            click.echo(str(path), err=True)
    else:
        for path, text in plan.files.items():
            click.echo(f"# {path}\n{text}")
    click.echo(f"then: {plan.then}", err=True)


def _catalogue(watchlist: Path | None, state: Path | None, ledger: str | None) -> Catalogue:
    from converter.batch.catalogue import Catalogue
    from converter.batch.database import Database
    from converter.batch.ledger import Ledger
    from converter.batch.site import Place
    from converter.batch.watchlist import read_watchlist

    read = None if watchlist is None else read_watchlist(watchlist, inputs=False)
    place = Place.of(read, state=state, ledger=ledger)
    file = Path(place.url.removeprefix("sqlite:///"))
    if place.url.startswith("sqlite:///") and not file.exists():
        raise UsageError(
            f"{file}: there is no such ledger; run `convert batch run WATCHLIST` first, or give "
            "--watchlist, --state or --ledger"
        )
    database = Database(place.url)
    click.get_current_context().call_on_close(database.close)
    return Catalogue(Ledger(database))


def _chosen(
    catalogue: Catalogue, patterns: tuple[str, ...], states: tuple[str, ...] | None
) -> list[Entry]:
    from converter.batch.catalogue import choose

    found = choose(catalogue.entries(superseded=states is None), patterns)
    chosen = [entry for entry in found if states is None or entry.job.state in states]
    if not chosen:
        told = [f"{entry.job.target} is {entry.state}" for entry in found]
        why = f"{'; '.join(told)}, which this does not change" if told else "no such job"
        raise UsageError(f"{' '.join(patterns)}: {why}")
    busy = [entry.job.target for entry in chosen if entry.running]
    if busy:
        raise UsageError(f"{', '.join(busy)}: is being worked on; stop the run first")
    return chosen


def _tell(what: str, chosen: list[Entry]) -> None:
    for entry in chosen:
        click.echo(f"{what}: {entry.job.id} {entry.job.target}")
