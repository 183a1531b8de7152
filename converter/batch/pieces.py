"""Pieces of a large conversion in the ledger, so that several workers make one release.

The worker that holds a release cuts its conversion into pieces, by shards of the outputs. Any
worker that sees the shared folder claims a piece, as releases are claimed: by one conditional
UPDATE, with a lease and a fence of its own. What a piece made is recorded in the folder
(`converter.execute.parts`); the ledger says who is at it and which are left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    update,
)

from converter.batch.claims import Claim, Task, task_of
from converter.batch.ledger import OPEN, Ledger
from converter.batch.schema import job, piece, release

_TRIED: Final = 20
"""Free pieces that are tried before a claim gives up, for others are quicker."""
PIECE_BYTES: Final = 16_000_000_000
"""Bytes of weights in a piece: about a minute of a disk, where starting one takes seconds."""


def pieces_of(weight_bytes: int, most: int) -> int:
    """Into how many pieces a conversion is cut that could be cut into ``most``.

    By size and not by who is there, so that whoever goes on with a release cuts it the same, and
    small enough that however many workers come find something to do.
    """
    return min(most, max(2, -(-weight_bytes // PIECE_BYTES)))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPiece:
    """A piece that could be claimed now; ``memory`` is the bytes that it needs."""

    id: int
    repo: str
    commit: str
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(OpenPiece):
    """A piece that a worker holds, with the release and the jobs that it is of."""

    release: int
    number: int
    count: int
    fence: int
    tasks: tuple[Task, ...]


class Pieces:
    """One worker's view of the pieces in a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.database = ledger.database

    def cut(self, claim: Claim, jobs: Sequence[int], count: int, *, memory: int = 0) -> None:
        """Offer the conversion of these jobs in so many pieces; safe to repeat.

        ``memory`` is the bytes that making one takes. Pieces that an earlier holder of the release
        cut in the same way keep their state.
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
                values |= {"total": count, "memory": memory, "state": "open", "lease_until": 0.0}
                connection.execute(piece.insert().values(claims=0, updated=now, **values))

        self.database.do(work)

    def clear(self, claim: Claim) -> int:
        """Remove the pieces of a release whose conversion is over; at how many a worker was."""
        mine = piece.c.release_id == claim.release

        def work(connection: Connection) -> int:
            now = self.ledger.fence(connection, claim)
            count = select(func.count()).select_from(piece).where(mine, _in_hand(now))
            at_work = int(connection.scalar(count) or 0)
            connection.execute(delete(piece).where(mine))
            return at_work

        return self.database.do(work)

    def left(self, claim: Claim) -> int:
        """How many pieces of a release a worker has, or will still take."""
        mine = and_(piece.c.release_id == claim.release, piece.c.state == "open")

        def look(connection: Connection) -> int:
            now = self.database.now(connection)
            held = select(func.count()).select_from(piece).where(mine, _in_hand(now))
            free = connection.execute(select(piece).where(mine, ~_in_hand(now))).all()
            return int(connection.scalar(held) or 0) + len(_of_open_jobs(connection, free))

        return self.database.do(look)

    def open(self) -> list[OpenPiece]:
        """Every piece that could be claimed now."""

        def look(connection: Connection) -> list[OpenPiece]:
            rows = connection.execute(self._listed(self.database.now(connection))).all()
            return [
                OpenPiece(id=row.id, repo=row.repo, commit=row.commit, memory=row.memory)
                for row in _of_open_jobs(connection, rows)
            ]

        return self.database.do(look)

    def claim(
        self,
        held: Collection[int] = (),
        *,
        only: int | None = None,
        of: Collection[int] | None = None,
        memory: int | None = None,
    ) -> Piece | None:
        """Take a piece that needs at most ``memory`` bytes; None when none is free.

        ``held`` are the pieces in hand already; ``only`` is the one that may be taken, ``of`` are
        the releases of which one may be.
        """
        wanted = [
            piece.c.id.not_in(held),
            piece.c.id == only if only is not None else true(),
            piece.c.release_id.in_(of) if of is not None else true(),
            piece.c.memory <= memory if memory is not None else true(),
        ]
        return self.database.do(lambda connection: self._claim(connection, and_(*wanted)))

    def _claim(self, connection: Connection, wanted: ColumnElement[bool]) -> Piece | None:
        now = self.database.now(connection)
        rows = connection.execute(self._listed(now).where(wanted)).all()
        for row in _of_open_jobs(connection, rows)[:_TRIED]:
            taken = connection.execute(
                update(piece)
                .where(piece.c.id == row.id, self._free(now), piece.c.claims == row.claims)
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
                    memory=row.memory,
                    number=row.number,
                    count=row.total,
                    fence=row.claims + 1,
                    tasks=tuple(found[one] for one in row.jobs if one in found),
                )
        return None

    def _listed(self, now: float) -> Any:
        """The free pieces, with what names their release."""
        return (
            select(piece, release.c.repo, release.c.commit)
            .join(release, release.c.id == piece.c.release_id)
            .where(self._free(now))
            .order_by(piece.c.id)
        )

    def _free(self, now: float) -> ColumnElement[bool]:
        """Open pieces whose worker is gone, or had none, of releases that somebody holds."""
        home = release.alias()
        return and_(
            piece.c.state == "open",
            # One that is mine and not in hand: the answer to an earlier claim was lost.
            or_(
                piece.c.owner.is_(None),
                piece.c.lease_until < now,
                piece.c.owner == self.ledger.owner,
            ),
            exists().where(
                home.c.id == piece.c.release_id,
                home.c.owner.is_not(None),
                home.c.lease_until >= now,
            ),
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


def _in_hand(now: float) -> ColumnElement[bool]:
    """Pieces that a worker has, as far as its lease tells."""
    return and_(piece.c.owner.is_not(None), piece.c.lease_until >= now)


def _of_open_jobs(connection: Connection, rows: Sequence[Row[Any]]) -> list[Row[Any]]:
    """The pieces among these whose jobs are all still to be done: no others are of any use."""
    ids = {one for row in rows for one in row.jobs}
    found = select(job.c.id).where(job.c.id.in_(ids), job.c.state.in_(OPEN))
    still = set(connection.scalars(found))
    return [row for row in rows if still.issuperset(row.jobs)]
