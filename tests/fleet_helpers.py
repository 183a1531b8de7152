"""A Dask fleet in processes of its own: a scheduler, workers and runs over one ledger."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from batch_helpers import NAMES, PATHS, Named, command, note, write_program

from converter.batch import pieces
from converter.batch.orders import Answer, Order

SLOW_S = 0.05


class Cluster:
    """Starts and ends the processes; everything is below one folder."""

    def __init__(self, root: Path, *, extra: str = "", environment: dict | None = None) -> None:
        self.root = root
        self.url = f"sqlite:///{root / 'ledger.db'}"
        (root / "once").mkdir()
        self.environment = os.environ | {"PYTHONPATH": PATHS, "ONCE": str(root / "once")}
        self.environment |= environment or {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        write_program(root, lease="8s", patience="30s", extra=extra)
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
        return self._start("scheduler", [*command, "--port", str(self.port), "--no-dashboard"])

    def worker(self, name: str, *tags: str, **environment: str) -> subprocess.Popen:
        return self._start(name, self._command("worker", name, tags), **environment)

    def run(self, name: str = "run") -> subprocess.Popen:
        return self._start(name, self._command("run", name))

    def plain_worker(self, name: str) -> subprocess.Popen:
        """A worker of somebody else's at the same scheduler."""
        words = [sys.executable, "-m", "distributed.cli.dask_worker", self.address]
        return self._start(name, [*words, "--no-dashboard", "--no-nanny"])

    def _command(self, role: str, name: str, tags: tuple[str, ...] = ()) -> list[str]:
        told = {"role": role, "ledger": self.url, "address": self.address, "tags": tags}
        return command(self.root, self.root / name, helpers="fleet_helpers", **told)

    def _start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen:
        with (self.root / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | environment,
                cwd=self.root,
            )
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


# Real conversions between stages that only pretend.


def examine(order: Order) -> Answer:
    from converter.batch import examine as module

    _small_shards()
    return module.examine(order)


def fetch(order: Order) -> Answer:
    from converter.batch.work import fetch_release

    return fetch_release(order)


def convert(order: Order) -> Answer:
    from converter.batch.work import convert_release
    from converter.execute import run, units

    _small_shards()
    units.UNIT_BYTES, run.FLUSH_BYTES = 16 << 10, 32 << 10
    shards = order.shards
    note(order, "convert" if shards is None else f"piece {shards.name}", "begin")
    slowly = order.folder.parents[1] / "slowly"
    if shards is not None and shards.number == 1 and slowly.exists():
        slowly.unlink()  # the first one that tries is the one to kill
        encode = run.encode

        def waiting(*arguments, **named):
            time.sleep(SLOW_S)
            return encode(*arguments, **named)

        run.encode = waiting
    answer = convert_release(order)
    note(order, "convert" if shards is None else f"piece {shards.name}", "end")
    return answer


def prove(order: Order) -> Answer:
    (part,) = order.parts
    shutil.copytree(order.out(part), order.folder.parents[1] / "proved" / part.target)
    return Answer()


def _small_shards() -> None:
    from converter.plan import layout

    layout.lay_out.__kwdefaults__["shard_bytes"] = 200_000


class Real:
    """A stage of this module by its name, which can cross to another process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, order: Order) -> Answer:
        return globals()[self.name](order)


if os.environ.get("REAL"):
    pieces.PIECE_BYTES = 1  # a piece for every shard
PRELOAD = ["fleet_helpers"]
PRELOAD += ["converter.batch.work", "quant.floats"] if os.environ.get("REAL") else []
REAL = ("examine", "fetch", "convert", "prove") if os.environ.get("REAL") else ()
STAGES = {name: Real(name) if name in REAL else Named(name) for name in NAMES}
