"""The processes of a simulated night: started, killed, replaced, until the work is done."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.night import Night

ROOT = Path(__file__).parents[1]
TURN_S = 0.5
REST_S = 3.0
"""Between two starts of workers."""
END_S = 20.0
ROLE_EVERY = 4
"""Each so many kills of a worker, the fleet's scheduler or run goes as well, in turn."""
AWAY_S = 4.0
"""How long the database is away when it is restarted."""
Process = subprocess.Popen[bytes]
# Whatever the hub client may do on its own, and short waits where it would take minutes.
ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | {
    "OMP_NUM_THREADS": "1",
    "HF_TOKEN": "hf_sentinelOfTheNight",
}


def work(night: Night, endpoint: str, watchlist: Path) -> None:
    """Start workers, kill some, start others, until a run finds nothing left to do.

    Every worker ends by itself once, so that it clears up what a kill left.
    """
    start = _starter(night, endpoint, watchlist)
    running: dict[int, Process] = {}
    beside: dict[str, Process] = {}
    choose = night.choose or every(night.kill_every, random.Random(night.seed))
    restart = night.restart_every or float("inf")
    rested = 0.0
    begun = time.monotonic()
    restarts = begun + restart

    def tell(what: str) -> None:
        night.say(f"{time.monotonic() - begun:.0f} s: {what}")

    try:
        while True:
            if night.fleet:
                for role in ("scheduler", "run"):
                    if role not in beside or beside[role].poll() is not None:
                        if role == "run" and role in beside and settled(night.ledger):
                            _end(night, running, start)
                            return
                        beside[role] = start(role)
            for number in range(night.workers):
                process = running.get(number)
                if process is None or process.poll() is not None:
                    if not night.fleet and process is not None and settled(night.ledger):
                        _end(night, running, start)
                        return
                    if time.monotonic() > rested:
                        rested = time.monotonic() + REST_S
                        running[number] = start(number)
                        night.started += 1
            if time.monotonic() - begun > night.deadline:
                night.say("the night is over before the work is")
                return
            victim = choose(night, running)
            if victim is not None and victim.poll() is None:
                victim.send_signal(signal.SIGKILL)  # alone: its children have to notice
                night.killed += 1
                tell("killed a worker")
                if night.fleet and night.killed % ROLE_EVERY == 0:
                    role = ("scheduler", "run")[night.killed // ROLE_EVERY % 2]
                    beside[role].send_signal(signal.SIGKILL)
                    night.roles[role] += 1
                    tell(f"killed the {role}")
            if night.postgres is not None and time.monotonic() > restarts:
                restarts = time.monotonic() + restart
                night.postgres.stop()
                time.sleep(AWAY_S)
                night.postgres.start()
                night.restarted += 1
                tell("restarted the database")
            time.sleep(TURN_S)
    finally:
        for process in (*running.values(), *beside.values()):
            process.kill()
            process.wait()


def _end(night: Night, running: dict[int, Process], start: Callable[[int | str], Process]) -> None:
    """Let each worker end by itself, one that was killed after another start."""
    for number, process in running.items():
        if process.poll() == -signal.SIGKILL:
            running[number] = start(number)
            night.started += 1
            if night.fleet:
                time.sleep(END_S)  # until it has looked after its folder
        if night.fleet:
            running[number].terminate()
    for process in running.values():
        process.wait(timeout=120)


def _starter(night: Night, endpoint: str, watchlist: Path) -> Callable[[int | str], Process]:
    temporary = night.root / "tmp"
    temporary.mkdir()
    environment = os.environ | ENVIRONMENT
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(night.root / "home")}
    environment |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    environment |= {"CONVERT_LEDGER": night.ledger}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    dask = night.root / "dask"
    dask.mkdir()
    batch = ["-m", "converter", "batch"]
    where = ["--quiet", "--state"]

    def start(role: int | str) -> Process:
        own = environment
        if role == "scheduler":
            own = environment | {"TMPDIR": str(dask), "DASK_LOGGING__DISTRIBUTED": "warning"}
            command = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
            command += ["--port", port, "--no-dashboard"]
        elif role == "run":
            command = [*batch, "run", str(watchlist), "--scheduler", address]
            command += [*where, str(night.root / "w-run")]
        elif night.fleet:
            command = [*batch, "worker", address, str(watchlist)]
            command += [*where, str(night.root / f"w{role}")]
        else:
            command = [*batch, "run", str(watchlist), *where, str(night.root / f"w{role}")]
        return subprocess.Popen(
            [sys.executable, *command], env=own, cwd=night.root, start_new_session=True
        )

    return start


def every(
    seconds: float | None, rng: random.Random
) -> Callable[[Night, dict[int, Process]], Process | None]:
    """Somebody who kills a worker at random every so often."""
    due = time.monotonic() + (seconds or 0)

    def choose(night: Night, running: dict[int, Process]) -> Process | None:
        nonlocal due
        if seconds is None or time.monotonic() < due:
            return None
        due = time.monotonic() + seconds
        return rng.choice(list(running.values()))

    return choose


def settled(ledger: str) -> bool:
    """Whether every job in the ledger is published, parked, or waits for somebody's permission."""
    rows = entries(ledger)
    return bool(rows) and all(row["state"] not in ("queued", "running") for row in rows)


def entries(ledger: str) -> list[dict[str, Any]]:
    """Every job in the ledger, as ``convert batch status --json`` tells it."""
    from converter.batch.catalogue import Catalogue
    from converter.batch.database import Database
    from converter.batch.ledger import Ledger
    from converter.batch.status import rows_of

    database = Database(ledger)
    try:
        return rows_of(Catalogue(Ledger(database)).entries())
    finally:
        database.close()
