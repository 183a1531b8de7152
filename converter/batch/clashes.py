"""Which job has a repo, where several would publish in it: the first to ask, until it is no more.

A job that does not own what it would publish in stays parked, and is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from converter.batch.schema import job, release
from converter.naming import DRAFTER, published_as


def near(connection: Connection, target: str) -> Sequence[Row[Any]]:
    """Jobs that publish as ``target``, or would with a drafter; with repo and content."""
    beside = [target, target + DRAFTER]
    beside += [target.removesuffix(DRAFTER)] if target.endswith(DRAFTER) else []
    return connection.execute(
        select(job, release.c.repo, release.c.content)
        .join(release, release.c.id == job.c.release_id)
        .where(job.c.target.in_(beside), job.c.state != "superseded")
    ).all()


def clash(jobs: Sequence[Row[Any]], target: str, repo: str, *, mtp: bool) -> str | None:
    """Why a job of the release ``repo`` cannot be published as ``target``; None where it can.

    ``jobs`` are those that are `near`. A repo takes one output or drafter, of one release.
    """
    mine = published_as(target, mtp=mtp)
    shared: dict[str, set[str]] = {}
    for row in jobs:
        if not row.owns or (row.repo, row.target) == (repo, target):
            continue
        theirs = published_as(row.target, mtp=bool(row.recipe.get("mtp")))
        for one in set(mine) & set(theirs):
            shared.setdefault(one, set()).add(row.repo)
    if not shared:
        return None
    one, repos = min(shared.items())
    if repos == {repo}:
        return (
            f"{one} is made from {repo} by another recipe already, as one's drafter and the "
            "other's output; rename one of the two"
        )
    return (
        f"{one} is made from {', '.join(sorted(repos))} already; give names with {{organisation}}, "
        "or take one of the two releases out of the watch list and forget its jobs"
    )


def standing(connection: Connection, row: Row[Any]) -> str | None:
    """The clash of a job in the ledger as things are now, None where there is none.

    ``row`` has the job's columns and its release's repo.
    """
    mtp = bool(row.recipe.get("mtp"))
    return clash(near(connection, row.target), row.target, row.repo, mtp=mtp)
