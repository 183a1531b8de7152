"""The ledger's other side: what is wanted, seen and asked for by hand."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, or_, select, update

from converter.batch.clashes import clash, near, standing
from converter.batch.ledger import OPEN, Ledger, insert_new
from converter.batch.recipes import Asked, Policy, digest
from converter.batch.schema import attempt, job, piece, release, run, watermark
from converter.errors import UsageError

UNFINISHED = (*OPEN, "parked", "quarantined")
_UNMOVED = (None, "held", "usage", "gate")
"""Classes of failure that have nothing to do with where a job's adapter lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A release as the hub shows it; ``content`` is a hash of every file but the card."""

    repo: str
    commit: str
    content: str
    weight_bytes: int
    modified: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One variant of a release, and where it is published."""

    variant: str
    asked: Asked
    target: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class Entry:
    """A job with its release, as people look at it."""

    job: Row[Any]
    release: Row[Any]
    running: bool

    @property
    def state(self) -> str:
        """The job's state, or ``running`` while somebody holds a live lease."""
        return "running" if self.running else str(self.job.state)

    def failure(self) -> dict[str, Any]:
        """What a run tells of a job that it could not publish."""
        told = {"target": self.job.target, "repo": self.release.repo, "commit": self.release.commit}
        told |= {"state": self.job.state, "class": self.job.error_class}
        return told | {"reason": self.job.error}


class Catalogue:
    """Adds, lists and changes jobs; needs no lease."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.database = ledger.database

    def enqueue(self, seen: Seen, wanted: Sequence[Wanted]) -> int:
        """Make the ledger hold these jobs; how many of them are new. Safe to repeat."""
        return self.database.do(lambda connection: self._enqueue(connection, seen, wanted))

    def _enqueue(self, connection: Connection, seen: Seen, wanted: Sequence[Wanted]) -> int:
        now = self._alone(connection)
        key = and_(release.c.repo == seen.repo, release.c.commit == seen.commit)
        values = {
            "repo": seen.repo,
            "commit": seen.commit,
            "content": seen.content,
            "weight_bytes": seen.weight_bytes,
            "modified": seen.modified,
            "lease_until": 0.0,
            "claims": 0,
        }
        insert_new(connection, release, values)
        release_id = connection.execute(select(release.c.id).where(key)).scalar_one()
        return sum(self._want(connection, seen, release_id, one, now) for one in wanted)

    def _want(
        self, connection: Connection, seen: Seen, release_id: int, one: Wanted, now: float
    ) -> bool:
        recipe = one.asked.hash
        beside = near(connection, one.target)
        rows = [row for row in beside if row.target == one.target]
        mine = [row for row in rows if row.release_id == release_id and row.recipe_hash == recipe]
        for row in mine:
            kept = row.state == "published" or row.error_class == "held"
            if kept or row.tools == self.ledger.tools:
                self._renew_policy(connection, row, one, now)
                return False
        older = [row for row in rows if row.repo == seen.repo]
        self._supersede(connection, older, now)
        current = any(
            row.state == "published" and row.content == seen.content and row.recipe_hash == recipe
            for row in older
        )
        taken = clash(beside, one.target, seen.repo, mtp=one.asked.mtp)
        return insert_new(
            connection,
            job,
            {
                "release_id": release_id,
                "recipe_hash": recipe,
                "tools": self.ledger.tools,
                "target": one.target,
                "kind": "card" if current else "convert",
                "variant": one.variant,
                "recipe": one.asked.to_json(),
                "policy": one.policy.to_json(),
                **_fresh(now, taken),
                "facts": {},
                "created": now,
            },
        )

    def _renew_policy(self, connection: Connection, row: Row[Any], one: Wanted, now: float) -> None:
        moved = digest(row.recipe) != digest(one.asked.to_json())
        if moved:  # its adapter lies elsewhere
            changed = update(job).where(job.c.id == row.id)
            connection.execute(changed.values(recipe=one.asked.to_json(), updated=now))
        if row.state in UNFINISHED and (
            row.error_class == "adapter" or (moved and row.error_class not in _UNMOVED)
        ):
            changed = update(job).where(job.c.id == row.id)
            connection.execute(changed.values(**_fresh(now)))
        if Policy(**row.policy) == one.policy:
            return
        values: dict[str, Any] = {"policy": one.policy.to_json(), "updated": now}
        waits = row.state == "waiting" and row.needs is not None
        if waits or (row.state == "parked" and row.error_class == "gate"):
            values |= _fresh(now)
        connection.execute(update(job).where(job.c.id == row.id).values(values))

    def _supersede(self, connection: Connection, rows: Sequence[Row[Any]], now: float) -> None:
        ids = [row.id for row in rows if row.state in UNFINISHED]
        connection.execute(
            update(job).where(job.c.id.in_(ids)).values(state="superseded", updated=now)
        )

    def renew(self) -> int:
        """Give every unfinished job of other tool versions a new chance; how many there were.

        One whose repo is another's stays parked.
        """

        def work(connection: Connection) -> int:
            now = self._alone(connection)
            other = job.c.tools != self.ledger.tools
            stale = [row for row in _unheld(connection, other) if _is_known(row.recipe)]
            kept = ("release_id", "recipe_hash", "target", "kind", "variant", "recipe", "policy")
            for row in stale:
                values = {name: getattr(row, name) for name in kept}
                values |= _fresh(now, standing(connection, row))
                values |= {"tools": self.ledger.tools, "facts": {}, "created": now}
                _insert_again(connection, values)
            self._supersede(connection, stale, now)
            return len(stale)

        return self.database.do(work)

    def settle(self) -> int:
        """Make jobs due whose repo was another's and is no more; how many there were."""

        def work(connection: Connection) -> int:
            now = self._alone(connection)
            freed = 0
            for row in _unheld(connection, job.c.owns == 0):
                taken = standing(connection, row)
                freed += taken is None
                if taken is None or taken != row.error:
                    changed = update(job).where(job.c.id == row.id)
                    connection.execute(changed.values(**_fresh(now, taken)))
            return freed

        return self.database.do(work)

    def _alone(self, connection: Connection) -> float:
        """The time, once nobody else decides about repos: two at once would both find one free."""
        self.database.lock(connection, "enqueue")
        return self.database.now(connection)

    def watermark(self, watchlist: str, organisation: str) -> float | None:
        """Up to where an organisation's releases have been looked at, seconds since 1970."""
        here = and_(watermark.c.watchlist == watchlist, watermark.c.organisation == organisation)
        found = self.database.do(
            lambda connection: connection.scalar(select(watermark.c.modified).where(here))
        )
        return None if found is None else float(found)

    def set_watermark(self, watchlist: str, organisation: str, modified: float) -> None:
        """Remember up to where an organisation's releases are in the ledger."""

        def work(connection: Connection) -> None:
            values = {"watchlist": watchlist, "organisation": organisation, "modified": modified}
            if not insert_new(connection, watermark, values):
                connection.execute(
                    update(watermark)
                    .where(
                        watermark.c.watchlist == watchlist,
                        watermark.c.organisation == organisation,
                        watermark.c.modified < modified,
                    )
                    .values(modified=modified)
                )

        self.database.do(work)

    def entries(self, *, superseded: bool = False) -> list[Entry]:
        """Every job with its release, by repo, newest commit first."""

        def work(connection: Connection) -> list[Entry]:
            now = self.database.now(connection)
            releases = {row.id: row for row in connection.execute(select(release))}
            found = []
            for row in connection.execute(select(job)):
                if row.state == "superseded" and not superseded:
                    continue
                home = releases[row.release_id]
                live = home.owner is not None and home.lease_until >= now
                elsewhere = row.needs is not None and not row.inside
                running = live and row.state in OPEN and row.not_before <= now and not elsewhere
                found.append(Entry(row, home, running))
            found.sort(key=lambda e: (e.release.repo, -e.release.modified, e.job.id))
            return found

        return self.database.do(work)

    def taken(self) -> list[Entry]:
        """Jobs that stay parked since another has their repo."""
        return [entry for entry in self.entries() if not entry.job.owns]

    def attempts(self) -> list[Row[Any]]:
        """Every attempt of every job, oldest first."""
        return self.database.do(
            lambda connection: list(connection.execute(select(attempt).order_by(attempt.c.ended)))
        )

    def runs(self) -> list[Row[Any]]:
        """Every run, newest first."""
        return self.database.do(
            lambda connection: list(
                connection.execute(select(run).order_by(run.c.started.desc()).limit(1000))
            )
        )

    def began(self, run_id: str, watchlist: str) -> None:
        """A run begins."""
        values: dict[str, Any] = {"id": run_id, "watchlist": watchlist}
        values |= {"host": self.ledger.host}
        values |= {"started": time.time(), "summary": {}}

        def work(connection: Connection) -> None:
            insert_new(connection, run, values)

        self.database.do(work)

    def ended(self, run_id: str, status: int, summary: Mapping[str, Any]) -> None:
        """A run has ended."""
        values = {"ended": time.time(), "status": status, "summary": dict(summary)}
        self.database.do(
            lambda connection: connection.execute(
                update(run).where(run.c.id == run_id).values(values)
            )
        )

    def retry(self, chosen: Sequence[Entry]) -> dict[int, str]:
        """Make jobs due at once, their failures forgotten.

        By number those that stay parked, since their repo is another job's, and why.
        """

        def work(connection: Connection) -> dict[int, str]:
            now = self._alone(connection)
            refused: dict[int, str] = {}
            for row in _with_repos(connection, job.c.id.in_([one.job.id for one in chosen])):
                taken = standing(connection, row)
                refused |= {row.id: taken} if taken else {}
                changed = update(job).where(job.c.id == row.id)
                connection.execute(changed.values(**_fresh(now, taken)))
            return refused

        return self.database.do(work)

    def park(self, chosen: Sequence[Entry], reason: str) -> None:
        """Leave jobs alone until somebody says ``retry``."""
        held = {"state": "parked", "error_class": "held", "error": reason}
        changed = update(job).where(job.c.id.in_([entry.job.id for entry in chosen]))

        def work(connection: Connection) -> None:
            connection.execute(changed.values(updated=self.database.now(connection), **held))

        self.database.do(work)

    def forget(self, chosen: Sequence[Entry]) -> None:
        """Remove jobs and their history; the next discovery that sees them starts anew."""
        ids = [entry.job.id for entry in chosen]

        def work(connection: Connection) -> None:
            connection.execute(delete(attempt).where(attempt.c.job_id.in_(ids)))
            connection.execute(delete(job).where(job.c.id.in_(ids)))
            left = select(job.c.release_id)
            connection.execute(delete(piece).where(piece.c.release_id.not_in(left)))
            connection.execute(delete(release).where(release.c.id.not_in(left)))
            # What was forgotten lies below the watermarks, where nobody would look again.
            connection.execute(delete(watermark))

        self.database.do(work)


def choose(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The jobs whose number, source, target or ``source@commit`` one of the patterns matches."""

    def matches(entry: Entry, pattern: str) -> bool:
        repo, commit = entry.release.repo, entry.release.commit
        names = (str(entry.job.id), repo, entry.job.target, f"{repo}@{commit}")
        return any(fnmatchcase(name, pattern) for name in names)

    return [e for e in entries if any(matches(e, pattern) for pattern in patterns)]


def _is_known(recipe: Mapping[str, Any]) -> bool:
    """Whether this version of the program can make what a recipe asks for."""
    try:
        Asked.from_json(recipe)
    except (UsageError, ValueError, KeyError):  # a method, say, that this version has not
        return False
    return True


def _insert_again(connection: Connection, values: Mapping[str, Any]) -> None:
    """Insert a job, or begin the one anew that these tools had before others replaced it."""
    if not insert_new(connection, job, values):
        keys = ("release_id", "recipe_hash", "tools", "target")
        same = and_(*(job.c[name] == values[name] for name in keys), job.c.state == "superseded")
        connection.execute(update(job).where(same).values(dict(values)))


def _with_repos(connection: Connection, which: ColumnElement[bool]) -> Sequence[Row[Any]]:
    """Jobs with the repo of their release, the first to ask first."""
    return connection.execute(
        select(job, release.c.repo)
        .join(release, release.c.id == job.c.release_id)
        .where(which)
        .order_by(job.c.id)
    ).all()


def _unheld(connection: Connection, which: ColumnElement[bool]) -> Sequence[Row[Any]]:
    """Unfinished jobs that nobody has parked by hand, with the repo of their release."""
    free = or_(job.c.error_class != "held", job.c.error_class.is_(None))
    return _with_repos(connection, and_(which, job.c.state.in_(UNFINISHED), free))


def _fresh(now: float, taken: str | None = None) -> dict[str, Any]:
    """A job as if it had never been tried; parked where its repo is ``taken``."""
    return {
        "state": "parked" if taken else "queued",
        "owns": 0 if taken else 1,
        "stage": None,
        "attempts": {},
        "crashes": 0,
        "inside": 0,
        "lost": 0,
        "not_before": now,
        "needs": None,
        "error_class": "usage" if taken else None,
        "error": taken,
        "updated": now,
    }
