"""A Dask fleet in processes of its own: a scheduler, workers and runs over one ledger."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from batch_helpers import NAMES, PATHS, Named, note

from converter.batch.orders import Answer, Order

WATCHLIST = """
namespace = "night"
[[watch]]
organisations = ["nobody"]
variants = ["bf16"]
[retries]
lease = "8s"
first_wait = 0.05
patience = "30s"
"""
PROGRAM = """
import sys
from pathlib import Path
from fleet_helpers import PRELOAD, STAGES
from converter.batch import run as module
from converter.batch.dask import Scheduler
from converter.batch.discover import Found
from converter.batch.fleet_worker import serve
from converter.batch.tags import with_own
from converter.batch.watchlist import read_watchlist
module.discover = lambda *arguments, **named: Found()
if __name__ == "__main__":
    role, state, ledger, address, watchlist, *tags = sys.argv[1:]
    place = module.Place.of(None, state=Path(state), ledger=ledger)
    read = read_watchlist(Path(watchlist))
    scheduler = Scheduler.of(address, ca_file=None, cert=None, key=None)
    preload = ["fleet_helpers", *PRELOAD]
    told = dict(echo=lambda line: print(line, flush=True), stages=STAGES, preload=preload)
    if role == "worker":
        sys.exit(serve(read, place, scheduler, tags=with_own(tags), **told))
    sys.exit(module.run(read, place, name="watch.toml", scheduler=scheduler, **told))
"""
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
        (root / "program.py").write_text(PROGRAM)
        (root / "watch.toml").write_text(WATCHLIST + extra)
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
        return self._start("scheduler", [*command, "--port", str(self.port), "--no-dashboard"])

    def worker(self, name: str, *tags: str, **environment: str) -> subprocess.Popen:
        return self._start(name, self._command("worker", name, *tags), **environment)

    def run(self, name: str = "run") -> subprocess.Popen:
        return self._start(name, self._command("run", name))

    def _command(self, role: str, name: str, *tags: str) -> list[str]:
        program, watchlist = self.root / "program.py", self.root / "watch.toml"
        told = [role, self.root / name, self.url, self.address, watchlist, *tags]
        return [sys.executable, *map(str, [program, *told])]

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


PRELOAD = ["converter.batch.work", "quant.floats"] if os.environ.get("REAL") else []
REAL = ("examine", "fetch", "convert", "prove") if os.environ.get("REAL") else ()
STAGES = {name: Real(name) if name in REAL else Named(name) for name in NAMES}
