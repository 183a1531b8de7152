"""The ledger's database: one that is away or busy, another version's, and none at all."""

import sqlite3
import threading

import pytest
from batch_helpers import add, ledger
from sqlalchemy import select, text, update

from converter.batch.catalogue import Catalogue
from converter.batch.database import Database
from converter.batch.pieces import Pieces
from converter.batch.schema import attempt, job, migrate, version_table
from converter.errors import ConvertError, UsageError

pytestmark = pytest.mark.usefixtures("closed_ledgers")


def test_a_database_that_restarts_is_waited_for(postgres):
    mine = ledger(postgres.database().replace(":", "+psycopg:", 1))
    add(Catalogue(mine))
    postgres.stop()
    threading.Timer(0.5, postgres.start).start()
    assert mine.claim() is not None


def test_a_database_that_stays_away_is_said(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}", patience=0)
    database.engine.dispose()
    (tmp_path / "ledger.db").unlink()
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(ConvertError, match="the ledger failed: unable to open database"):
        database.do(lambda connection: None)


def test_a_newer_ledger_is_left_alone(tmp_path):
    ledger_url = f"sqlite:///{tmp_path / 'ledger.db'}"
    database = Database(ledger_url)
    database.do(lambda c: c.execute(update(version_table).values(version=99)))
    with pytest.raises(UsageError, match="schema version 99 and this program knows 4"):
        Database(ledger_url)
    database.do(lambda c: c.execute(update(version_table).values(version=4)))
    Database(ledger_url).do(lambda c: migrate(c, (lambda _: pytest.fail("run twice"),) * 4))


def test_an_older_ledger_is_brought_up_step_by_step(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    done = []
    steps = tuple(lambda c, number=number: done.append(number) for number in (1, 2, 3, 4, 5, 6))
    database.do(lambda c: migrate(c, steps))
    assert done == [5, 6]
    assert database.do(lambda c: c.scalar(select(version_table.c.version))) == 6


@pytest.mark.parametrize(
    ("version", "undone"),
    [
        (1, ("DROP TABLE piece", "ALTER TABLE job DROP COLUMN needs")),
        (2, ("ALTER TABLE piece DROP COLUMN memory",)),
        (3, ("ALTER TABLE job DROP COLUMN owns",)),
    ],
)
def test_a_ledger_of_an_older_version_keeps_its_jobs(ledger_url, version, undone):
    add(Catalogue(ledger(ledger_url)))
    database = ledger(ledger_url).database
    for statement in undone:
        database.do(lambda c, statement=statement: c.execute(text(statement)))
    database.do(lambda c: c.execute(update(version_table).values(version=version)))
    mine = ledger(ledger_url)
    (task,) = mine.claim().tasks
    assert (task.target, task.needs) == ("night/model-bf16", None)
    assert Pieces(mine).open() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://x/y", "mysql is neither sqlite nor postgresql"),
        ("no ledger_url", "not an SQLAlchemy URL"),
    ],
)
def test_a_ledger_that_cannot_be_is_refused(url, message):
    with pytest.raises(UsageError, match=message):
        Database(url)


def test_a_busy_sqlite_is_waited_for(mine, catalogue, tmp_path):
    add(catalogue)
    blocker = sqlite3.connect(
        tmp_path / "state" / "ledger.db", isolation_level=None, check_same_thread=False
    )
    blocker.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, blocker.execute, ["ROLLBACK"]).start()
    assert mine.claim() is not None
    blocker.close()


def test_tables_have_what_the_report_needs():
    assert {"peak_memory", "bytes", "host", "outcome", "stage"} <= set(attempt.c.keys())
    assert {"recipe_hash", "tools", "attempts", "facts"} <= set(job.c.keys())
