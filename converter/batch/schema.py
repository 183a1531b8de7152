"""The ledger's tables, and how an older ledger becomes a current one.

A release is the unit that is claimed, because all its variants are made from one read; a job is
one variant of it. Times are seconds since 1970 by the database's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    select,
    text,
    update,
)

from converter.errors import UsageError
from converter.naming import published_as

metadata = MetaData()

version_table = Table("ledger_version", metadata, Column("version", Integer, nullable=False))

toolset = Table(
    "toolset",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("versions", JSON, nullable=False),
)

release = Table(
    "release",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("repo", String(200), nullable=False),
    Column("commit", String(64), nullable=False),
    Column("content", String(64), nullable=False),  # hash of every file but the card
    Column("weight_bytes", BigInteger, nullable=False),
    Column("modified", Float, nullable=False),
    Column("owner", String(100)),  # who holds the lease; null when nobody does
    Column("host", String(200)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("heartbeat", Float),
    Column("claims", Integer, nullable=False, default=0),  # fences off an owner that came back
    UniqueConstraint("repo", "commit"),
)

job = Table(
    "job",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("release_id", Integer, ForeignKey("release.id"), nullable=False),
    Column("recipe_hash", String(64), nullable=False),
    Column("tools", String(64), ForeignKey("toolset.hash"), nullable=False),
    Column("target", String(200), nullable=False),
    Column("kind", String(10), nullable=False),  # convert, or card: only the card is renewed
    Column("variant", String(100), nullable=False),
    Column("recipe", JSON, nullable=False),
    Column("policy", JSON, nullable=False),
    Column("state", String(12), nullable=False),
    Column("stage", String(10)),  # the last one that was entered
    Column("attempts", JSON, nullable=False),  # failures of each stage since it last went well
    Column("crashes", Integer, nullable=False, default=0),
    Column("inside", Integer, nullable=False, default=0),  # 1 while the stage is being worked on
    Column("lost", Integer, nullable=False, default=0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("error_class", String(12)),
    Column("error", Text),
    Column("needs", String(40)),  # tag that the worker of the next stage must have
    Column("owns", Integer, nullable=False, server_default="1"),  # 0: its repo is another job's
    Column("facts", JSON, nullable=False),  # plan, checkpoint, bytes, parity, address
    Column("peak_memory", BigInteger),
    Column("host", String(200)),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    UniqueConstraint("release_id", "recipe_hash", "tools", "target"),
    Index("job_due", "state", "not_before"),
    Index("job_target", "target"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", Integer, ForeignKey("job.id"), nullable=False, index=True),
    Column("stage", String(10), nullable=False),
    Column("number", Integer, nullable=False),
    Column("started", Float, nullable=False),
    Column("ended", Float, nullable=False),
    Column("outcome", String(12), nullable=False),  # ok, or the class of the failure
    Column("error", Text),
    Column("host", String(200), nullable=False),
    Column("peak_memory", BigInteger),
    Column("bytes", BigInteger),
)

piece = Table(  # of a conversion that several workers share: some shards of every output
    "piece",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("release_id", Integer, ForeignKey("release.id"), nullable=False),
    Column("jobs", JSON, nullable=False),  # ids of the jobs that are converted together
    Column("number", Integer, nullable=False),  # from 1
    Column("total", Integer, nullable=False),  # pieces of this conversion
    Column("memory", BigInteger, nullable=False, server_default="0"),  # bytes that one needs
    Column("state", String(8), nullable=False),  # open, done, failed
    Column("owner", String(100)),
    Column("host", String(200)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("claims", Integer, nullable=False, default=0),
    Column("updated", Float, nullable=False),
    UniqueConstraint("release_id", "number", "total"),
)

twin = Table(
    "twin",
    metadata,
    Column("config", String(64), primary_key=True),
    Column("tools", String(64), primary_key=True),
    Column("verdict", String(10), nullable=False),
    Column("text", Text, nullable=False),
)

watermark = Table(
    "watermark",
    metadata,
    Column("watchlist", String(64), primary_key=True),  # hash of namespace and entry
    Column("organisation", String(100), primary_key=True),
    Column("modified", Float, nullable=False),
)

run = Table(
    "run",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("watchlist", Text, nullable=False),
    Column("host", String(200), nullable=False),
    Column("started", Float, nullable=False),
    Column("ended", Float),
    Column("status", Integer),
    Column("summary", JSON, nullable=False),
)


def _first(connection: Connection) -> None:
    metadata.create_all(connection)


def _second(connection: Connection) -> None:
    metadata.create_all(connection)
    _add(connection, "job", "needs", "VARCHAR(40)")


def _third(connection: Connection) -> None:
    _add(connection, "piece", "memory", "BIGINT NOT NULL DEFAULT 0")


_JUDGED: Final = ("id", "target", "recipe", "state", "stage", "error_class")


def _fourth(connection: Connection) -> None:
    _add(connection, "job", "owns", "INTEGER NOT NULL DEFAULT 1")
    # Until then a job that clashed was one which no stage had found fault with.
    clashed = "state = 'parked' AND error_class = 'usage' AND stage IS NULL"
    connection.execute(text(f"UPDATE job SET owns = 0 WHERE {clashed}"))
    # Parking by hand has put its own class in the place of a clash.
    late = job.c.id.in_(_held_late(connection))
    connection.execute(update(job).where(late).values(owns=0))


def _held_late(connection: Connection) -> list[int]:
    """Jobs that were parked by hand before any stage, and whose repo others asked for before.

    Who asks is a release under a target, from its first job on, whatever has replaced that since.
    """
    columns = (*(job.c[name] for name in _JUDGED), release.c.repo)
    jobs = connection.execute(select(*columns).join(release).order_by(job.c.id)).all()
    first: dict[str, dict[tuple[str, str], int]] = {}
    standing: dict[str, set[tuple[str, str]]] = {}
    held = []
    for row in jobs:
        asker = (row.repo, row.target)
        repos = published_as(row.target, mtp=bool(row.recipe.get("mtp")))
        for repo in repos:
            first.setdefault(repo, {}).setdefault(asker, row.id)
            if row.state != "superseded":
                standing.setdefault(repo, set()).add(asker)
        if (row.state, row.error_class, row.stage) == ("parked", "held", None):
            held.append((row.id, asker, repos))
    return [
        number
        for number, asker, repos in held
        if any(
            first[repo][other] < first[repo][asker] for repo in repos for other in standing[repo]
        )
    ]


def _add(connection: Connection, table: str, name: str, kind: str) -> None:
    """Add a column where it is not there: tables are created as they are now."""
    if name not in {column["name"] for column in inspect(connection).get_columns(table)}:
        connection.execute(text(f"ALTER TABLE {table} ADD COLUMN {name} {kind}"))


MIGRATIONS: Final[tuple[Callable[[Connection], None], ...]] = (_first, _second, _third, _fourth)
"""Step ``n`` makes version ``n + 1`` out of version ``n``; a released step never changes."""


def migrate(connection: Connection, steps: tuple[Callable[[Connection], None], ...]) -> None:
    """Bring the ledger up to the last step, in the caller's transaction.

    Raises UsageError for a ledger that a newer version has written.
    """
    version_table.create(connection, checkfirst=True)
    found = connection.scalar(select(version_table.c.version)) or 0
    if found > len(steps):
        raise UsageError(
            f"the ledger has schema version {found} and this program knows {len(steps)}: use the "
            "version of the program that wrote it"
        )
    for step in steps[found:]:
        step(connection)
    connection.execute(version_table.delete())
    connection.execute(version_table.insert().values(version=len(steps)))
