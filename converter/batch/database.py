"""A connection to the ledger's database, patient with one that is restarted."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from converter.batch.schema import MIGRATIONS, migrate
from converter.errors import ConvertError, UsageError

PATIENCE_S: Final = 120.0
"""How long a database may be away before its loss is an error."""
_MIGRATING: Final = 0x6D6C7864  # any number that all versions of this program agree on
_LOCKED: Final = "mlx-dayzero "  # begins what locks are named by, for the same reason
Result = TypeVar("Result")


class Database:
    """Runs short transactions; each is repeated as a whole when the database was away.

    So whatever runs in one must be safe to do twice: a commit whose answer was lost is done again.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE_S) -> None:
        """Open the database at an SQLAlchemy URL and bring its tables up to date."""
        self.patience = patience
        self.engine = _engine(url)
        self.sqlite = self.engine.dialect.name == "sqlite"
        self.do(self._migrate)

    def _migrate(self, connection: Connection) -> None:
        if not self.sqlite:  # two programs that start at once must not both create the tables
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})
        migrate(connection, MIGRATIONS)

    def do(self, work: Callable[[Connection], Result]) -> Result:
        """The result of ``work`` in one transaction; ConvertError when the database stays away."""
        deadline = time.monotonic() + self.patience
        wait = 0.05
        while True:
            try:
                with self.engine.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                away = error.connection_invalidated or isinstance(
                    error, OperationalError | InterfaceError
                )
                if not away or time.monotonic() > deadline:
                    raise ConvertError(f"the ledger failed: {_told(error)}") from error
                self.engine.dispose()
            time.sleep(wait)
            wait = min(2.0, wait * 2)

    def lock(self, connection: Connection, name: str) -> None:
        """Wait until no other transaction holds ``name``, and hold it to this one's end.

        What is read afterwards is what those others have written. SQLite has one at a time anyway.
        """
        if not self.sqlite:
            connection.execute(select(func.pg_advisory_xact_lock(_key(name))))

    def try_lock(self, connection: Connection, name: str) -> bool:
        """The same without waiting: False where another transaction holds ``name``."""
        if self.sqlite:
            return True
        return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(_key(name)))))

    def now(self, connection: Connection) -> float:
        """Seconds since 1970 by the one clock that all users of this ledger share."""
        if self.sqlite:
            return time.time()
        return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())")) or 0)

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()


def _key(name: str) -> int:
    """A lock's number, of the 64 bits that PostgreSQL has for them."""
    digest = hashlib.sha256(f"{_LOCKED}{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def ledger_url(url: str | None, state: Path) -> str:
    """The database to use: the one asked for, or SQLite in the state folder."""
    if url is None:
        return f"sqlite:///{state / 'ledger.db'}"
    return f"postgresql+psycopg{url[len('postgresql') :]}" if url.startswith("postgresql:") else url


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
        if name not in ("sqlite", "postgresql"):
            raise UsageError(f"ledger: {name} is neither sqlite nor postgresql")
        if name == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"connect_args": {"timeout": 60}} if name == "sqlite" else {}
        engine = create_engine(parsed, pool_pre_ping=name != "sqlite", **settings)
    except ArgumentError as error:
        raise UsageError("ledger: is not an SQLAlchemy URL such as postgresql://host/name") from (
            error
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            f"ledger: {error.name} is not installed; pip install 'mlx-dayzero[postgresql]'"
        ) from error
    if name == "sqlite":
        event.listen(engine, "connect", _sqlite_connected)
        event.listen(engine, "begin", _sqlite_begun)
    return engine


def _sqlite_connected(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver's own transactions start too late
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begun(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _told(error: DBAPIError) -> str:
    from converter.hub.errors import redact

    return redact(" ".join(str(error.orig).split()))[:500]
