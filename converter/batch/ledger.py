"""The ledger: what is to be done, who is doing it, and what came of it.

A claim is one conditional UPDATE of a release's row, which is atomic on every database; each
write of a worker repeats the condition, so that one whose lease has passed on changes nothing.
"""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    exists,
    func,
    or_,
    select,
    true,
    update,
)

from converter.batch.claims import Claim, Due, LeaseLostError, Task, Used, task_of
from converter.batch.database import Database
from converter.batch.failures import Failure, State, verdict
from converter.batch.recipes import FORMAT, digest
from converter.batch.schema import attempt, job, release, toolset, twin
from converter.batch.watchlist import Retries
from converter.manifest import installed_versions

OPEN: Final = ("queued", "waiting")
_SHOWN: Final = 200
"""Due releases that are looked at together; the rest are due later."""
_TOOLS: Final = ("mlx-dayzero", "mlx", "mlx-lm", "mlx-vlm", "torch", "transformers")


def tool_versions() -> dict[str, str]:
    """Versions of everything that may change what becomes of a job."""
    return installed_versions(_TOOLS)


class Ledger:
    """One worker's view of the ledger."""

    def __init__(
        self,
        database: Database,
        *,
        retries: Retries | None = None,
        owner: str | None = None,
        tags: Collection[str] = (),
    ) -> None:
        """Work as ``owner``, by default a name that no other process has.

        ``tags`` says what this worker has that a stage may need.
        """
        self.tags = frozenset(tags)
        self.database = database
        self.retries = retries or Retries()
        self.host = platform.node() or "localhost"
        self.owner = owner or f"{self.host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.versions = tool_versions()
        self.tools = digest({**self.versions, "recipes": FORMAT})
        database.do(self._know_tools)

    def _know_tools(self, connection: Connection) -> None:
        known = connection.scalar(select(toolset.c.hash).where(toolset.c.hash == self.tools))
        if known is None:
            insert_new(connection, toolset, {"hash": self.tools, "versions": self.versions})

    def claim(self, held: Collection[int] = (), *, only: int | None = None) -> Claim | None:
        """Take the release that has been due for longest, None when nothing is due.

        ``held`` are the releases in hand already; ``only`` is the one that may be taken.
        """
        return self.database.do(lambda connection: self._claim(connection, tuple(held), only))

    def _claim(self, connection: Connection, held: Sequence[int], only: int | None) -> Claim | None:
        now = self.database.now(connection)
        free = and_(self._free_releases(now), ~_busy(now))
        candidates = connection.execute(
            self._due_releases(now)
            .where(release.c.id.not_in(held))
            .where(release.c.id == only if only is not None else true())
            .limit(20)
        ).all()
        for row in candidates:
            if not self.take(connection, row, free, now):
                continue  # somebody else was quicker
            if row.owner not in (None, self.owner):
                self._count_lost(connection, row, now)
            (due,) = self._with_tasks(connection, [row], now)
            if due.tasks:
                return Claim.of(due, fence=row.claims + 1)
            self._free(connection, row.id, row.claims + 1)
        return None

    def due(self) -> list[Due]:
        """What could be claimed now, what has been due for longest first."""

        def look(connection: Connection) -> list[Due]:
            now = self.database.now(connection)
            rows = connection.execute(self._due_releases(now).limit(_SHOWN)).all()
            return self._with_tasks(connection, rows, now)

        return self.database.do(look)

    def _free_releases(self, now: float) -> ColumnElement[bool]:
        # A release that is mine and not in hand: the answer to an earlier claim was lost.
        return or_(
            release.c.owner.is_(None),
            release.c.lease_until < now,
            release.c.owner == self.owner,
        )

    def _due_releases(self, now: float) -> Select[Any]:
        """Free releases with a job that is due, in the order in which they are claimed."""
        due = and_(
            job.c.release_id == release.c.id,
            job.c.state.in_(OPEN),
            job.c.not_before <= now,
            self._able(),
        )
        oldest = select(func.min(job.c.not_before)).where(due).scalar_subquery()
        return (
            select(release)
            .where(self._free_releases(now), exists().where(due), ~_busy(now))
            .order_by(oldest, release.c.modified, release.c.id)
        )

    def _with_tasks(
        self, connection: Connection, rows: Sequence[Row[Any]], now: float
    ) -> list[Due]:
        """Rows of releases with the jobs of each that are due."""
        soon = now + self.retries.first_wait  # variants that failed together are read together
        tasks: dict[int, list[Task]] = {row.id: [] for row in rows}
        found = connection.execute(
            select(job)
            .where(
                job.c.release_id.in_(list(tasks)),
                job.c.state.in_(OPEN),
                job.c.not_before <= soon,
                self._able(),
            )
            .order_by(job.c.id)
        )
        for one in found:
            tasks[one.release_id].append(task_of(one))
        return [
            Due(
                release=row.id,
                repo=row.repo,
                commit=row.commit,
                weight_bytes=row.weight_bytes,
                tasks=tuple(tasks[row.id]),
            )
            for row in rows
        ]

    def _able(self) -> ColumnElement[bool]:
        """Jobs for these versions of the tools, whose next stage these tags are enough for."""
        fits = or_(job.c.needs.is_(None), job.c.needs.in_(self.tags))
        return and_(job.c.tools == self.tools, fits)

    def _count_lost(self, connection: Connection, row: Row[Any], now: float) -> None:
        """The last owner never gave the release back: it was killed, or its machine was.

        That speaks against the jobs it was inside a stage of, not against those that only waited.
        """
        suspects = connection.execute(
            select(job).where(job.c.release_id == row.id, job.c.state.in_(OPEN), job.c.inside == 1)
        ).all()
        for found in suspects:
            lost = found.lost + 1
            text = f"the worker on {row.host} vanished in stage {found.stage or 'examine'}"
            decided = verdict(
                "lost", attempts=1, crashes=found.crashes, lost=lost, retries=self.retries
            )
            connection.execute(
                update(job)
                .where(job.c.id == found.id)
                .values(
                    lost=lost,
                    inside=0,
                    state=decided.state if decided.state == "parked" else found.state,
                    error_class="lost",
                    error=f"{text} ({lost} times)" if lost > 1 else text,
                    updated=now,
                )
            )

    def take(
        self, connection: Connection, row: Row[Any], free: ColumnElement[bool], now: float
    ) -> bool:
        """Make a release this worker's if it still is as it was read, and ``free``.

        Whether it is free hangs on other commits of its repo, whose rows no UPDATE of this one
        looks at again: so nobody else decides about the repo meanwhile.
        """
        if not self.database.try_lock(connection, f"repo {row.repo}"):
            return False
        taken = connection.execute(
            update(release)
            .where(release.c.id == row.id, free, release.c.claims == row.claims)
            .values(
                owner=self.owner,
                host=self.host,
                lease_until=now + self.retries.lease,
                heartbeat=now,
                claims=row.claims + 1,
            )
        )
        return bool(taken.rowcount == 1)

    def expire(self, owners: str) -> int:
        """End the leases of owners whose name begins so and who are known to be gone."""
        gone = release.c.owner.startswith(owners, autoescape=True)
        return self.database.do(
            lambda connection: (
                connection.execute(
                    update(release).where(gone, release.c.lease_until > 0).values(lease_until=0.0)
                ).rowcount
            )
        )

    def heartbeat(self, claims: Collection[Claim]) -> set[int]:
        """Prolong the leases; the releases that are no longer this worker's."""

        def beat(connection: Connection, claim: Claim) -> bool:
            return self._keep(connection, claim, prolong=True) is not None

        # One transaction each: two that hold several releases could wait for one another.
        return {
            claim.release for claim in claims if not self.database.do(partial(beat, claim=claim))
        }

    def _keep(self, connection: Connection, claim: Claim, *, prolong: bool = False) -> float | None:
        """The time, once a claim that still stands has beaten; None for one that does not.

        One whose lease has run out stands until somebody takes the release, or another commit of
        its repo; which is decided under the same lock (`take`).
        """
        self.database.lock(connection, f"repo {claim.repo}")
        now = self.database.now(connection)
        until = {"lease_until": now + self.retries.lease} if prolong else {}
        kept = connection.execute(
            update(release)
            .where(
                release.c.id == claim.release,
                release.c.owner == self.owner,
                release.c.claims == claim.fence,
                or_(release.c.lease_until >= now, ~_busy(now)),
            )
            .values(heartbeat=now, **until)
        )
        return now if kept.rowcount == 1 else None

    def entered(self, claim: Claim, jobs: Collection[int], stage: str) -> None:
        """Record that a stage begins; LeaseLostError when the release is another worker's."""

        def enter(connection: Connection) -> None:
            now = self.fence(connection, claim)
            values = {"stage": stage, "inside": 1, "host": self.host, "updated": now}
            connection.execute(update(job).where(job.c.id.in_(jobs)).values(values))

        self.database.do(enter)

    def passed(
        self,
        claim: Claim,
        job_id: int,
        stage: str,
        used: Used,
        *,
        facts: Mapping[str, Any] | None = None,
        published: bool = False,
    ) -> None:
        """Record that a stage went well, what was learned, and whether the job is done."""

        def record(connection: Connection) -> None:
            now = self.fence(connection, claim)
            row = connection.execute(select(job).where(job.c.id == job_id)).one()
            left = {name: count for name, count in row.attempts.items() if name != stage}
            values: dict[str, Any] = {
                "attempts": left,
                "inside": 0,
                "facts": {**row.facts, **(facts or {})},
                "peak_memory": max(row.peak_memory or 0, used.peak_memory or 0) or None,
                "updated": now,
            }
            if published:
                values |= {"state": "published", "needs": None}
                values |= {"error_class": None, "error": None}
            connection.execute(update(job).where(job.c.id == job_id).values(values))
            self._log(connection, row, stage, used, "ok", None)

        self.database.do(record)

    def failed(
        self,
        claim: Claim,
        job_id: int,
        stage: str,
        used: Used,
        failure: Failure,
        *,
        facts: Mapping[str, Any] | None = None,
    ) -> State:
        """Record a failure and decide what becomes of the job."""

        def record(connection: Connection) -> State:
            now = self.fence(connection, claim)
            row = connection.execute(select(job).where(job.c.id == job_id)).one()
            attempts = {**row.attempts, stage: row.attempts.get(stage, 0) + 1}
            crashes = row.crashes + (failure.kind in ("crash", "internal"))
            decided = verdict(
                failure.kind,
                attempts=attempts[stage],
                crashes=crashes,
                lost=row.lost,
                retries=self.retries,
            )
            connection.execute(
                update(job)
                .where(job.c.id == job_id)
                .values(
                    state=decided.state,
                    stage=stage,
                    inside=0,
                    attempts=attempts,
                    crashes=crashes,
                    not_before=now + decided.wait,
                    error_class=failure.kind,
                    error=failure.text,
                    facts={**row.facts, **(facts or {})},
                    peak_memory=max(row.peak_memory or 0, used.peak_memory or 0) or None,
                    host=self.host,
                    updated=now,
                )
            )
            self._log(connection, row, stage, used, failure.kind, failure.text)
            return decided.state

        return self.database.do(record)

    def hand_over(self, claim: Claim, job_id: int, tag: str) -> str:
        """Leave a job's next stage to a worker tagged so; the reason that people read."""
        text = f"waits for a worker tagged {tag}, which drives the output through the runtimes"

        def record(connection: Connection) -> str:
            now = self.fence(connection, claim)
            values = {"state": "waiting", "needs": tag, "error_class": "worker", "error": text}
            changed = update(job).where(job.c.id == job_id)
            connection.execute(changed.values(not_before=now, inside=0, updated=now, **values))
            return text

        return self.database.do(record)

    def give_back(self, claim: Claim) -> None:
        """End the lease; nothing happens when it has passed on already."""
        self.database.do(lambda connection: self._free(connection, claim.release, claim.fence))

    def next_due(self) -> float | None:
        """Seconds until the next job of nobody's is due, None when there is none."""

        def look(connection: Connection) -> float | None:
            now = self.database.now(connection)
            when = connection.scalar(
                select(func.min(job.c.not_before))
                .join(release, release.c.id == job.c.release_id)
                .where(
                    job.c.state.in_(OPEN),
                    self._able(),
                    or_(release.c.owner.is_(None), release.c.lease_until < now),
                )
            )
            return None if when is None else max(0.0, when - now)

        return self.database.do(look)

    def twins(self) -> dict[str, tuple[str, str]]:
        """Verdict and text of every twin judged with these tools, by its config's hash."""
        rows = self.database.do(
            lambda connection: connection.execute(
                select(twin).where(twin.c.tools == self.tools)
            ).all()
        )
        return {row.config: (row.verdict, row.text) for row in rows}

    def judged_twin(self, config: str, verdict_: str, text: str) -> None:
        """Remember what a twin showed."""
        key = {"config": config, "tools": self.tools}

        def record(connection: Connection) -> None:
            insert_new(connection, twin, {**key, "verdict": verdict_, "text": text})

        self.database.do(record)

    def fence(self, connection: Connection, claim: Claim) -> float:
        """The time, once the claim has been found to be live; LeaseLostError otherwise."""
        now = self._keep(connection, claim)
        if now is None:
            raise LeaseLostError(claim.repo)
        return now

    def _free(self, connection: Connection, release_id: int, fence: int) -> None:
        freed = connection.execute(
            update(release)
            .where(
                release.c.id == release_id,
                release.c.owner == self.owner,
                release.c.claims == fence,
            )
            .values(owner=None, lease_until=0.0)
        )
        if freed.rowcount == 1:
            left = update(job).where(job.c.release_id == release_id)
            connection.execute(left.values(inside=0))

    def _log(
        self,
        connection: Connection,
        row: Row[Any],
        stage: str,
        used: Used,
        outcome: str,
        error: str | None,
    ) -> None:
        insert_new(
            connection,
            attempt,
            {
                "id": f"{used.id}:{row.id}",
                "job_id": row.id,
                "stage": stage,
                "number": row.attempts.get(stage, 0) + 1,
                "started": used.started,
                "ended": used.ended,
                "outcome": outcome,
                "error": error,
                "host": self.host,
                "peak_memory": used.peak_memory,
                "bytes": used.bytes,
            },
        )


def insert_new(connection: Connection, table: Any, values: Mapping[str, Any]) -> bool:
    """Insert a row unless one with its keys is there; whether it was inserted."""
    from sqlalchemy.dialects import postgresql, sqlite

    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).values(dict(values)).on_conflict_do_nothing()
    return bool(connection.execute(statement).rowcount)


def _busy(now: float) -> ColumnElement[bool]:
    """Releases of which another commit is in hand: uploads to one repo come one after another."""
    other = release.alias()
    return exists().where(
        other.c.repo == release.c.repo,
        other.c.id != release.c.id,
        other.c.owner.is_not(None),
        other.c.lease_until >= now,
    )
