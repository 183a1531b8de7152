"""Removing the folders of releases that nothing more is to be done for."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, or_, select

from converter.batch.catalogue import Catalogue
from converter.batch.claims import Claim
from converter.batch.ledger import Ledger
from converter.batch.schema import job, piece, release

_SWEPT: Final = ".swept-"
"""How a folder is called once it is nobody's."""


def folder_name(repo: str, commit: str) -> str:
    """What the folder is called in which a release is worked on."""
    return f"{repo.replace('/', '--')}@{commit[:12]}"


def sweep(work: Path, catalogue: Catalogue, *, shared: bool = False) -> None:
    """Remove the folders of releases that nothing more is to be done for here.

    A folder of this machine's own holds nothing of others: what they have in hand is theirs. In a
    ``shared`` one a folder goes only while its release is held for that, so that nobody begins to
    work in it meanwhile; one that this ledger knows nothing of may be that of another.
    """
    if not shared:
        _sweep_own(work, catalogue)
        return
    ledger = catalogue.ledger
    for number, repo, commit in _idle_releases(ledger):
        folder = work / folder_name(repo, commit)
        if not os.path.isdir(folder):
            continue
        claim = _seized(ledger, number)
        if claim is None:
            continue
        try:
            if os.path.isdir(folder):  # and nobody has swept it between the two looks
                with suppress(OSError):  # what cannot be removed now is left to the next sweep
                    folder.rename(work / f"{_SWEPT}{uuid.uuid4().hex}")
        finally:
            ledger.give_back(claim)
    for folder in work.glob(f"{_SWEPT}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _sweep_own(work: Path, catalogue: Catalogue) -> None:
    kept = {
        folder_name(entry.release.repo, entry.release.commit)
        for entry in catalogue.entries()
        if entry.job.state == "queued" and not entry.running
    }
    for folder in work.iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _idle_releases(ledger: Ledger) -> list[tuple[int, str, str]]:
    """Id, repo and commit of every release that nobody holds and nothing more is due of."""

    def look(connection: Connection) -> list[tuple[int, str, str]]:
        idle = _idle(ledger.database.now(connection))
        rows = connection.execute(select(release).where(idle))
        return [(row.id, row.repo, row.commit) for row in rows]

    return ledger.database.do(look)


def _seized(ledger: Ledger, number: int) -> Claim | None:
    """A release held while its folder goes, its pieces forgotten; None where it is not idle."""

    def take(connection: Connection) -> Claim | None:
        now = ledger.database.now(connection)
        row = connection.execute(select(release).where(release.c.id == number)).one_or_none()
        if row is None or not ledger.take(connection, row, _idle(now), now):
            return None
        connection.execute(delete(piece).where(piece.c.release_id == number))
        return Claim(
            release=row.id,
            repo=row.repo,
            commit=row.commit,
            weight_bytes=row.weight_bytes,
            tasks=(),
            fence=row.claims + 1,
        )

    return ledger.database.do(take)


def is_wanted(ledger: Ledger, claim: Claim) -> bool:
    """Whether some job will go on from the folder of a release in hand, whoever does it.

    Raises LeaseLostError where the release is another worker's.
    """

    def look(connection: Connection) -> bool:
        ledger.fence(connection, claim)
        mine = select(release.c.id).where(release.c.id == claim.release, _wanted())
        return connection.scalar(mine) is not None

    return ledger.database.do(look)


def _wanted() -> ColumnElement[bool]:
    """Releases with a job that will go on from what their folder holds."""
    left = or_(job.c.state == "queued", and_(job.c.state == "waiting", job.c.needs.is_not(None)))
    return exists().where(job.c.release_id == release.c.id, left)


def _idle(now: float) -> ColumnElement[bool]:
    """Releases that nobody works on, pieces included, and whose folder no job will go on from."""
    return and_(
        or_(release.c.owner.is_(None), release.c.lease_until < now),
        ~_wanted(),
        ~exists().where(
            piece.c.release_id == release.c.id,
            piece.c.owner.is_not(None),
            piece.c.lease_until >= now,
        ),
    )
