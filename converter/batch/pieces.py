"""Pieces of a large conversion in the ledger, so that several workers make one release.

The worker that holds a release cuts its conversion into pieces, by shards of the outputs. Any
worker that sees the shared folder claims a piece, as releases are claimed: by one conditional
UPDATE, with a lease and a fence of its own. What a piece made is recorded in the folder
(`converter.execute.parts`); the ledger says who is at it and which are left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select, true, update

from converter.batch.claims import Claim, Task, task_of
from converter.batch.ledger import Ledger
from converter.batch.schema import job, piece, release


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece that a worker holds, with the release and the jobs that it is of."""

    id: int
    release: int
    repo: str
    commit: str
    number: int
    count: int
    fence: int
    tasks: tuple[Task, ...]


class Pieces:
    """One worker's view of the pieces in a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.database = ledger.database

    def cut(self, claim: Claim, jobs: Sequence[int], count: int) -> None:
        """Offer the conversion of these jobs in so many pieces; safe to repeat.

        Pieces that an earlier holder of the release cut in the same way keep their state.
        """

        def work(connection: Connection) -> None:
            now = self.ledger.fence(connection, claim)
            mine = piece.c.release_id == claim.release
            rows = connection.execute(select(piece).where(mine)).all()
            if {(row.number, row.total) for row in rows} == {
                (number, count) for number in range(1, count + 1)
            } and all(row.jobs == list(jobs) for row in rows):
                failed = and_(mine, piece.c.state == "failed")
                connection.execute(update(piece).where(failed).values(state="open"))
                return
            connection.execute(delete(piece).where(mine))
            for number in range(1, count + 1):
                values = {"release_id": claim.release, "jobs": list(jobs), "number": number}
                values |= {"total": count, "state": "open", "lease_until": 0.0}
                connection.execute(piece.insert().values(claims=0, updated=now, **values))

        self.database.do(work)

    def clear(self, claim: Claim) -> None:
        """Remove the pieces of a release whose conversion is over."""

        def work(connection: Connection) -> None:
            self.ledger.fence(connection, claim)
            connection.execute(delete(piece).where(piece.c.release_id == claim.release))

        self.database.do(work)

    def left(self, claim: Claim) -> int:
        """How many pieces of a release nobody has finished."""
        mine = and_(piece.c.release_id == claim.release, piece.c.state == "open")
        count = select(func.count()).select_from(piece).where(mine)
        return int(self.database.do(lambda connection: connection.scalar(count)) or 0)

    def open(self) -> list[tuple[int, str, str]]:
        """Id, repo and commit of every piece that could be claimed now."""

        def look(connection: Connection) -> list[tuple[int, str, str]]:
            now = self.database.now(connection)
            rows = connection.execute(self._free(now)).all()
            return [(row.id, row.repo, row.commit) for row in rows]

        return self.database.do(look)

    def claim(self, *, only: int | None = None, of: Collection[int] | None = None) -> Piece | None:
        """Take a piece, ``only`` that one or one ``of`` these releases; None when none is free."""
        return self.database.do(lambda connection: self._claim(connection, only, of))

    def _claim(
        self, connection: Connection, only: int | None, of: Collection[int] | None
    ) -> Piece | None:
        now = self.database.now(connection)
        wanted = piece.c.id == only if only is not None else true()
        wanted = wanted if of is None else and_(wanted, piece.c.release_id.in_(of))
        for row in connection.execute(self._free(now).where(wanted).limit(20)).all():
            taken = connection.execute(
                update(piece)
                .where(piece.c.id == row.id, piece.c.claims == row.claims)
                .values(
                    owner=self.ledger.owner,
                    host=self.ledger.host,
                    lease_until=now + self.ledger.retries.lease,
                    claims=row.claims + 1,
                    updated=now,
                )
            )
            if taken.rowcount == 1:
                jobs = connection.execute(select(job).where(job.c.id.in_(row.jobs))).all()
                found = {one.id: task_of(one) for one in jobs}
                return Piece(
                    id=row.id,
                    release=row.release_id,
                    repo=row.repo,
                    commit=row.commit,
                    number=row.number,
                    count=row.total,
                    fence=row.claims + 1,
                    tasks=tuple(found[one] for one in row.jobs if one in found),
                )
        return None

    def _free(self, now: float) -> Any:
        """Open pieces whose worker is gone, or had none, of releases that somebody holds."""
        return (
            select(piece, release.c.repo, release.c.commit)
            .join(release, release.c.id == piece.c.release_id)
            .where(
                piece.c.state == "open",
                or_(piece.c.owner.is_(None), piece.c.lease_until < now),
                release.c.owner.is_not(None),
                release.c.lease_until >= now,
            )
            .order_by(piece.c.id)
        )

    def heartbeat(self, pieces: Collection[Piece]) -> set[int]:
        """Prolong the leases; the pieces that are no longer this worker's."""

        def beat(connection: Connection) -> set[int]:
            until = self.database.now(connection) + self.ledger.retries.lease
            return {
                one.id
                for one in pieces
                if connection.execute(
                    update(piece).where(self._mine(one)).values(lease_until=until)
                ).rowcount
                != 1
            }

        return self.database.do(beat)

    def settle(self, one: Piece, state: str) -> None:
        """Leave a piece done, failed, or open for others; nothing when it is not this worker's.

        A failed piece is left to the holder of the release, who fails in the same way and says so.
        """

        def work(connection: Connection) -> None:
            now = self.database.now(connection)
            values = {"state": state, "owner": None, "lease_until": 0.0, "updated": now}
            connection.execute(update(piece).where(self._mine(one)).values(**values))

        self.database.do(work)

    def expire(self, owners: str) -> None:
        """End the leases of owners whose name begins so and who are known to be gone."""
        gone = piece.c.owner.startswith(owners, autoescape=True)
        ended = update(piece).where(gone).values(lease_until=0.0)
        self.database.do(lambda connection: connection.execute(ended))

    def _mine(self, one: Piece) -> ColumnElement[bool]:
        return and_(
            piece.c.id == one.id,
            piece.c.owner == self.ledger.owner,
            piece.c.claims == one.fence,
        )
